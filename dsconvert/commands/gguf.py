"""`dsconvert gguf`: a checkpoint to GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.budget_options import budget_options
from dsconvert.commands.calibration_options import calibration_options
from dsconvert.commands.given import given, refuse
from dsconvert.commands.numbers import size
from dsconvert.commands.publish import Publish, publish_options
from dsconvert.commands.run import command, on_each_rank
from dsconvert.events import phase

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display
    from dsconvert.quantization.budget import Budget

FED_LENGTH = 2048  # tokens of a calibration window: error feedback needs more than an importance matrix


def _quants(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    from converters.gguf.file_types import FILE_TYPES
    from converters.gguf.mixtures import canonical

    names = tuple(canonical(name.strip()) for name in value.split(",") if name.strip())
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        raise click.BadParameter(
            f"{', '.join(unknown) or 'nothing'} is unknown; known: {', '.join(FILE_TYPES)}"
        )
    return names


def _offered(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """What a shell offers for the last of several names."""
    from converters.gguf.file_types import FILE_TYPES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in sorted(FILE_TYPES) if name.startswith(last.lower())]


def _overrides(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in value:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern:
            raise click.BadParameter(f"{text!r} is not of the form PATTERN=TYPE")
        pairs.append((pattern, kind.lower()))
    return tuple(pairs)


@command
@shared.model_argument
@shared.out_option()
@click.option(
    "-q",
    "--quant",
    "quants",
    default="q4_0",
    show_default=True,
    callback=_quants,
    shell_complete=_offered,
    help="Type or mixture; several, with commas, are made from one read.",
)
@click.option(
    "--tensor-type",
    "overrides",
    multiple=True,
    metavar="PATTERN=TYPE",
    callback=_overrides,
    help="Type for the tensors whose GGUF name the pattern matches; may be repeated.",
)
@budget_options("quants", "pure", named="--quant", counted="over the whole file", usual="q2_k to q8_0, no iq")
@click.option("--pure", is_flag=True, help="The same type for every matrix, no mixture.")
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance matrix (dsconvert imatrix, llama-imatrix): quantize what counts more exactly.",
)
@calibration_options(None, 512, ", to measure an importance matrix on the way.")
@click.option(
    "--solver",
    type=click.Choice(["imatrix", "gptq"]),
    default="imatrix",
    show_default=True,
    help="What is made of --calib: an importance matrix as llama.cpp uses it; or codes chosen by error "
    "feedback too, in files of the same types and size that are closer to the checkpoint, with windows of "
    "2048 tokens by default.",
)
@click.option(
    "--rounds",
    type=click.IntRange(0, 100),
    metavar="N",
    help="With --solver gptq: how often scales and codes are refined after it.  [default: 1 for q2_k and "
    "q3_k, else 0]",
)
@shared.resume_option
@shared.bos_option
@click.option("--pre", metavar="NAME", help="The runtime's pre-tokenizer, when none is proven to fit.")
@click.option(
    "--split-max-size",
    callback=size,
    metavar="SIZE",
    help="Split into files of at most this size (4G, 500M).",
)
@shared.mmproj_option
@click.option("--no-mmproj", is_flag=True, help="Convert the language model alone.")
@click.option(
    "--mmproj-quant",
    type=click.Choice(["f16", "bf16", "f32", "q8_0"]),
    default="f16",
    show_default=True,
    help="Type of the projector's matrices.",
)
@shared.hub_options
@click.option(
    "--ollama",
    is_flag=True,
    help="Write a Modelfile beside the file: its chat template and stop tokens.",
)
@shared.device_option
@shared.threads_option
@shared.conversion_effort
@publish_options
@shared.force_option
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity, too.")
@click.option("--dry-run", is_flag=True, help="Show every tensor, type and exact size; write nothing.")
def gguf(
    model_path: ModelPath,
    out: Path | None,
    quants: tuple[str, ...],
    overrides: tuple[tuple[str, str], ...],
    budget: Budget | None,
    pure: bool,
    imatrix: Path | None,
    calibration: CalibrationRequest | None,
    solver: str,
    rounds: int | None,
    resume: bool,
    add_bos: bool | None,
    pre: str | None,
    split_max_size: int | None,
    mmproj: Path | None,
    no_mmproj: bool,
    mmproj_quant: str,
    ollama: bool,
    device: str,
    threads: int | None,
    effort: str,
    force: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    publish: Publish,
    display: Display,
) -> int:
    """Convert a checkpoint to GGUF for llama.cpp, in one pass, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or an embedded sample: `sample:`,
    `sample-moe:` with experts, or `sample-vl:` with a vision tower; default: the current folder. With
    --solver gptq several GPUs may work: torchrun --nproc-per-node N -m dsconvert gguf ... Exit code 0:
    converted and proven, 2: stopped, 3: a check failed.

    \b
    Example:
      dsconvert gguf sample: --quant q4_k_m,q8_0
      dsconvert gguf sample: --quant q4_k_m --calib builtin --solver gptq
    """  # fmt: skip
    with phase("imports"):
        from converters.gguf.convert import convert
        from converters.gguf.output import Options

    if no_mmproj:
        refuse("mmproj_quant", where="with --no-mmproj", hint="Leave one of them out")
    if solver == "gptq" and calibration is not None and not given("calib_len"):
        calibration = replace(calibration, length=FED_LENGTH)
    if solver == "imatrix":
        refuse("rounds", "resume", where="without --solver gptq", hint="A file without it is made in one go")
    if calibration is None and effort != "full":
        refuse("device", where="without --calib and --effort full", hint="A plain conversion uses the CPU")
    options = Options(
        model=model_path, quants=quants, outfile=out, overrides=overrides, pure=pure, pre=pre,
        split_max_size=split_max_size, threads=threads or 0, effort=effort, force=force, dry_run=dry_run,
        allow_nonfinite=allow_nonfinite, mmproj=mmproj, no_mmproj=no_mmproj, mmproj_quant=mmproj_quant,
        ollama=ollama, device=device, imatrix=imatrix, add_bos=add_bos, calibration=calibration,
        solver=solver, rounds=rounds, resume=resume, budget=budget,
    )  # fmt: skip
    if solver == "imatrix":
        return display.events(publish.after(convert(options)), plan=dry_run)
    return on_each_rank(
        lambda ranks: convert(options, ranks), lambda e: display.events(publish.after(e), plan=dry_run)
    )
