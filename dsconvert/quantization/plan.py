"""What every calibrated conversion is asked for and has planned before any work, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from dsconvert.calibration.request import CalibrationRequest
from dsconvert.checkpoints.locate import ModelPath
from dsconvert.checkpoints.marked_folders import check_folder
from dsconvert.checkpoints.output_plan import REPLACED, check_place
from dsconvert.checkpoints.safetensors_writer import from_stored
from dsconvert.checkpoints.source_files import check_companions
from dsconvert.events import Event, TensorPlan, Warn
from dsconvert.proof.sources import StoredTensors
from dsconvert.quantization.linears import Selection, select
from dsconvert.quantization.run_state import check_state, state_folder
from dsconvert.quantization.tower_files import with_files
from tokenizer_tools.load import TokenizerData, load_tokenizer


@dataclass(frozen=True)
class RunOptions:
    """What a calibrated conversion is asked for besides its format's own settings.

    `calibration.bos` is not looked at: the tokenizer says what begins a document, or `add_bos`.
    """

    model: str | ModelPath
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    add_bos: bool | None = None
    out: Path | None = None
    resume: bool = False
    force: bool = False
    device: str = "auto"
    effort: str = "quick"


class Job(Protocol):
    """A conversion planned, of any format; nothing is written yet."""

    @property
    def run(self) -> RunOptions:
        """What was asked for."""
        ...

    @property
    def model(self) -> Selection:
        """What is quantized, and what is kept."""
        ...

    @property
    def tokenizer(self) -> TokenizerData:
        """The model's tokenizer."""
        ...

    @property
    def out(self) -> Path:
        """The output folder."""
        ...

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        ...

    @property
    def settings(self) -> str:
        """What of the format's own options the bytes of a block depend on, as --resume compares it."""
        ...


def open_model(run: RunOptions, language_only: bool, head: bool = False) -> tuple[Selection, TokenizerData]:
    """What is quantized and what is kept, with the configs of its layout, and the model's tokenizer.

    The options are those of `select`. Raises what opening a checkpoint and its tokenizer raises.
    """
    model = select(run.model, language_only, head)
    folder = model.checkpoint.folder
    check_companions(folder)
    tokenizer = load_tokenizer(folder, model.config.vocab_size, run.add_bos)
    return with_files(model, tokenizer), tokenizer


def output_folder(run: RunOptions, default: str) -> Path:
    """The output folder: the one asked for, else `default` here; raises OutputError for an unfit place."""
    out = (run.out or Path(default)).absolute()
    check_place(out, REPLACED)
    return out


def input_files(run: RunOptions, model: Selection) -> list[Path]:
    """The files and folders of the checkpoint and of the calibration text."""
    return [model.checkpoint.folder, *model.checkpoint.files, *run.calibration.files]


def check_output(job: Job, nbytes: int, own: Iterable[Path] = ()) -> None:
    """See that the folder, of `nbytes`, and the state beside it may be written and have room.

    `own` are further folders of ours that may be there. Raises OutputError.
    """
    space = 2 * nbytes  # the state and the folder, side by side
    check_folder(job.out, space, job.run.force, job.inputs, [state_folder(job.out), *own])
    check_state(job.out, job.run.resume, job.run.force)


def notes(job: Job) -> Iterator[Event]:
    """What the user should know of the checkpoint."""
    for note in (*job.model.checkpoint.notes, *job.model.config.notes, *job.tokenizer.notes):
        yield Warn(note)


def rows_of(model: Selection, kinds: Mapping[str, str], nbytes: Callable[[str], int]) -> list[TensorPlan]:
    """A row of the plan for each tensor: linears of so many bytes that become `kinds`, and what is kept."""
    rows = [
        TensorPlan(linear.out, name, linear.shape, model.source.dtype(name), kinds[name], nbytes(name))
        for name, linear in model.linears.items()
    ]
    for out, name in model.kept.items():
        tensor = model.checkpoint.tensors[name]
        rows.append(
            TensorPlan(out, name, tensor.shape, tensor.dtype, tensor.dtype, from_stored(tensor).nbytes)
        )
    return rows


def stored_tensors(model: Selection, kinds: Mapping[str, str]) -> StoredTensors:
    """Name, shape and type of every tensor of a folder whose linears are of these `kinds`, by name."""
    stored = model.checkpoint.tensors
    linears = ((linear.out, linear.shape, kinds[name]) for name, linear in model.linears.items())
    kept = ((out, stored[name].shape, stored[name].dtype) for out, name in model.kept.items())
    return frozenset((*linears, *kept))
