"""Drives exllamav2's own converter, for users who want its result: needs the package, and CUDA."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.exl2.opened import open_folder
from converters.exl2.plan import Job, Options, prepare, work_folder
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.marked_folders import kept_folder, model_folder
from dsconvert.checkpoints.output_folder import with_both_ropes
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.checkpoints.weight_files import SAFETENSORS
from dsconvert.errors import UsageError, quoted
from dsconvert.events import Event, Finished, Step
from dsconvert.models.diagnosis import stated_method
from dsconvert.models.language_model import Inner
from dsconvert.quantization.proof import prove_folder

MODULE = "exllamav2.conversion.convert_exl2"
OURS = "Leave --backend out: dsconvert's own quantizer needs neither"


def convert(options: Options) -> Iterator[Event]:
    """Run exllamav2's converter on the checkpoint as `options` say, and prove what it wrote.

    Calibration is its own built-in text, or the parquet file given. Raises UsageError where the package or
    CUDA is missing, for what it cannot read or would misread, and where it fails.
    """
    started = time.monotonic()
    check_installed()
    if options.measurement is not None:
        raise UsageError("exllamav2's converter does not read dsconvert's measurements", hint=OURS)
    job = prepare(options)
    check_readable(job)
    out, work = job.out, work_folder(job.out)
    yield Step(f"running {MODULE}, whose work folder is {work}")
    with (
        kept_folder(work, "work", options.run.resume),
        model_folder(out, job.most_nbytes, options.run.force, job.inputs) as part,
    ):
        made = run(job, work)
        check_unchanged(job.model.checkpoint.seen)
        for path in made.iterdir():
            path.rename(part / path.name)
    nbytes = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    yield Finished(str(out), nbytes, time.monotonic() - started)
    yield from prove_folder(job, lambda: open_folder(out), None)


def run(job: Job, work: Path) -> Path:
    """Run the converter in the folder `work`; returns the folder that it made. UsageError when it fails."""
    own, made = work / "job", work / "made"  # `work` itself holds our marker
    own.mkdir(exist_ok=True)
    shutil.rmtree(made, ignore_errors=True)
    arguments = command(job, own, made)
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not (made / "config.json").is_file():
        raise UsageError(
            "exllamav2's converter failed",
            where=work,
            why=" ".join(done.stdout.split())[-400:],
            hint=f"Look at its own output: {' '.join(arguments)}. {OURS}",
        )
    return made


def check_installed() -> None:
    """See that exllamav2 and CUDA are there; raises UsageError that says what to do without."""
    if importlib.util.find_spec("exllamav2") is None:
        raise UsageError("--backend exllamav2 needs the package exllamav2, which is not installed", hint=OURS)
    import torch

    if not torch.cuda.is_available():
        why = f"PyTorch {torch.__version__} sees no CUDA device"
        raise UsageError("--backend exllamav2 needs CUDA", why=why, hint=OURS)


def check_readable(job: Job) -> None:
    """See that exllamav2 reads the checkpoint as what it is; raises UsageError."""
    folder, raw = job.model.checkpoint.folder, job.model.raw
    if (remote := job.model.checkpoint.remote) is not None:
        raise UsageError(
            "exllamav2 reads files on this disk", where=remote.repository, hint=f"Leave --remote out. {OURS}"
        )
    if isinstance(job.model.source, Inner):
        raise UsageError("exllamav2 has no DeepSeek-VL", where=folder, hint=OURS)
    if misread := _misread(job.model.checkpoint):
        raise UsageError(
            "exllamav2 would not read this checkpoint as what it is",
            where=folder,
            why=misread,
            hint=f"Save it with transformers first. {OURS}",
        )
    read, meant = (
        (config.get("rope_theta") or 10000.0, config.get("rope_scaling") or None)
        for config in (raw, with_both_ropes(raw))
    )
    if read[0] != meant[0] or (read[1] is None) != (meant[1] is None):
        raise UsageError(
            f"exllamav2 would take RoPE's theta for {read[0]:g}, and {'a' if read[1] else 'no'} scaling",
            where=folder / "config.json",
            why="It reads rope_theta and rope_scaling only, and the file says more in rope_parameters",
            hint=f"Add rope_theta (and rope_scaling) to config.json. {OURS}",
        )


def _misread(checkpoint: Checkpoint) -> str:
    """What of a checkpoint is in a form that dsconvert reads and exllamav2 does not; "" for nothing."""
    files = [path for path in checkpoint.files if path.suffix == SAFETENSORS.suffix]
    named = {name for path in files for name in SAFETENSORS.read(path)}
    strange = next((name for name in checkpoint.tensors if name not in named), "")
    if strange:
        return f"It looks for {quoted(strange)}, which no safetensors file here names"
    method = stated_method(checkpoint.stated)
    return (
        f"config.json states the quantization {quoted(method)}, which the weights have not" if method else ""
    )


def command(job: Job, work: Path, out: Path) -> list[str]:
    """The command line of exllamav2's converter."""
    options = job.options
    flags: dict[str, Any] = {
        "-i": job.model.checkpoint.folder,
        "-o": work,
        "-cf": out,
        "-b": options.bpw,
        "-hb": options.head_bits,
    }
    text = options.run.calibration
    if text.text.endswith(".parquet"):
        flags |= {"-c": text.text, "-r": text.samples, "-l": text.length}
    parts = [sys.executable, "-m", MODULE, *(str(x) for flag in flags.items() for x in flag)]
    return [*parts, *([] if options.run.resume else ["-nr"])]
