"""Opens what `dsconvert chat` talks to: a GGUF file in llama.cpp, any folder in torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert.chat.model import Model
from dsconvert.errors import UsageError
from dsconvert.libraries import TORCH, need
from dsconvert.machine import usable_cores

if TYPE_CHECKING:
    from converters.gguf.parse import GGUFFile

CONTEXT = 4096  # tokens, where the model was trained on as many
PROJECTOR = "mmproj-"


@dataclass(frozen=True)
class Request:
    """What to open, and how."""

    path: Path
    mmproj: Path | None
    context: int | None
    threads: int | None
    device: str


@dataclass(frozen=True)
class Opened:
    """A loaded model, one line on it, and what the user should know."""

    model: Model
    title: str
    notes: tuple[str, ...]


@contextmanager
def open_model(request: Request) -> Iterator[Opened]:
    """Load what is named; raises ConversionError for what cannot be run."""
    if os.path.isfile(request.path):
        with _open_gguf(request) as opened:
            yield opened
    else:
        yield _open_folder(request)


@contextmanager
def _open_gguf(request: Request) -> Iterator[Opened]:
    from converters.gguf.opened import stated_quant
    from converters.gguf.parse import open_gguf
    from converters.gguf.projector.keys import is_projector
    from dsconvert.chat.file_model import open_file_model
    from dsconvert.proof.result import sizes_by_type

    file = open_gguf(request.path)  # says in plain words what llama.cpp would abort on
    if is_projector(file):
        raise UsageError(
            "is a projector, which only sees",
            where=request.path,
            hint="Give the text file; the projector beside it is found, or named with --mmproj",
        )
    trained = file.keys.get(f"{file.keys.get('general.architecture')}.context_length")
    context, notes = _context(request.context, trained if isinstance(trained, int) else None)
    mmproj = projector_of(file, request.mmproj)
    cpu = _on_cpu(request.device)
    threads = request.threads or usable_cores()
    quant = stated_quant(
        file, sizes_by_type((t.qtype.name, t.values, t.nbytes) for t in file.tensors.values())
    )
    with open_file_model(request.path, mmproj=mmproj, context=context, threads=threads, cpu=cpu) as model:
        title = f"{file.keys.get('general.name') or request.path.name}, {quant}, in llama.cpp"
        yield Opened(model, title, notes)


def _on_cpu(device: str) -> bool:
    """Whether llama.cpp is kept off the GPU; UsageError for one that this build of it does not have."""
    from dsconvert.runtimes.llama_h import knows_gpu

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device {device} cannot be chosen in llama.cpp",
            hint="Use auto, cpu or cuda; CUDA_VISIBLE_DEVICES=N chooses one of several",
        )
    if device == "cuda" and not knows_gpu():
        raise UsageError(
            "the installed llama.cpp runs on the CPU only",
            why="The package xllamacpp has builds for CUDA besides its usual one",
            hint="Install one of those, or use --device cpu",
        )
    return device == "cpu"


def _open_folder(request: Request) -> Opened:
    from converters.outputs import open_output
    from dsconvert.chat.torch_model import TorchModel
    from dsconvert.checkpoints.locate import SAMPLES, locate
    from tokenizer_tools.load import load_tokenizer

    need(*TORCH, what="a chat with a folder", instead="convert it with `dsconvert gguf`, for llama.cpp")
    if request.mmproj is not None:
        raise UsageError("--mmproj goes with a GGUF file", where=request.path, hint="Leave it out")
    named = str(request.path)
    opened = open_output(locate(named) if named in SAMPLES else request.path)
    tokenizer = load_tokenizer(opened.path, opened.config.vocab_size)
    context, notes = _context(request.context, opened.config.context_length)
    model = TorchModel(opened.source, opened.config, tokenizer, request.device, context)
    title = f"{opened.path.name}, {opened.quant}, dequantized and run in torch"
    return Opened(model, title, notes)


def _context(asked: int | None, trained: int | None) -> tuple[int, tuple[str, ...]]:
    """How many tokens the context has, and a note where the model was trained on fewer."""
    if asked is None:
        return min(CONTEXT, trained or CONTEXT), ()
    if trained is not None and asked > trained:
        return asked, (f"the model was trained on {trained} tokens: beyond them it may write nonsense",)
    return asked, ()


def projector_of(text: GGUFFile, named: Path | None) -> Path | None:
    """The projector of a text file: the one that is named, or the only one beside it that belongs to it.

    Raises UsageError for a named one that cannot be used with it, CheckpointError for one that is damaged.
    """
    from converters.gguf.parse import open_gguf
    from converters.gguf.projector.completeness import is_known, pair_faults

    if named is None:
        return _beside(text)
    projector = open_gguf(named)
    # Of a pair that a user names, ids count only where both files have them: those by others have none.
    faults = [fault for fault in pair_faults(text, projector) if "differ" in fault or "values" in fault]
    if not is_known(projector):
        faults = ["only projectors of DeepSeek-VL are run here; llama.cpp's llama-mtmd-cli runs others"]
    if faults:
        raise UsageError(
            "cannot be used with the text file",
            where=named,
            why="; ".join(faults),
            hint=f"dsconvert inspect {text.path} {named} compares the two",
        )
    return named


def _beside(text: GGUFFile) -> Path | None:
    """The projector named after a text file, or the only one in its folder, if it belongs to it."""
    from converters.gguf.parse import open_gguf
    from converters.gguf.projector.completeness import is_known, pair_faults
    from dsconvert.errors import CheckpointError

    own = text.path.with_name(PROJECTOR + text.path.name)
    fitting = []
    for path in [own] if own.is_file() else sorted(text.path.parent.glob(f"{PROJECTOR}*.gguf")):
        try:
            projector = open_gguf(path)
        except CheckpointError:
            continue  # nobody named it
        if is_known(projector) and not pair_faults(text, projector):
            fitting.append(path)
    return fitting[0] if len(fitting) == 1 else None
