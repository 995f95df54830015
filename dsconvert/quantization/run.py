"""The run that calibrated formats share: draw windows, walk the blocks, solve, keep state, publish, prove.

A format plans a `Job`, and `run` asks it for its `Format`: how a linear is solved and packed, how a finished
one is read back, how the folder is written and proven. Of several processes (torchrun) each takes a share of
the windows and of the linears; the first draws, chooses, writes and proves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from dsconvert import __version__
from dsconvert.calibration.record import Calibration
from dsconvert.calibration.request import calibrate
from dsconvert.checkpoints.safetensors_writer import Piece, from_array
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.linear_inputs import Group
from dsconvert.events import Event, Finished, Step, TensorDone, Warn
from dsconvert.proof.sources import Opened, StoredTensors
from dsconvert.proof.text import default_windows
from dsconvert.quantization.blocks import Restore, Solution, collected, quantize_blocks, running
from dsconvert.quantization.few_tokens import too_few
from dsconvert.quantization.linears import model_digest
from dsconvert.quantization.plan import Job
from dsconvert.quantization.proof import prove_folder
from dsconvert.quantization.ranks import Ranks
from dsconvert.quantization.run_state import State, open_state, state_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LinearSolved(Event):
    """A linear is quantized: its loss tr((W-Q) H (W-Q)^T) beside that without feedback, and how it went.

    `rtn_loss` is round-to-nearest's, in a GGUF file that of the importance matrix.
    """

    name: str
    setting: str
    loss: float
    rtn_loss: float
    damp: float
    dead: int
    fell_back: str | None
    seconds: float


class Solved(Protocol):
    """How a linear's solution went, whatever its format; see LinearSolved."""

    @property
    def loss(self) -> float: ...

    @property
    def rtn_loss(self) -> float: ...

    @property
    def damp(self) -> float: ...

    @property
    def dead(self) -> int: ...

    @property
    def fell_back(self) -> str | None: ...


# A linear solved: how it went, the output's tensors, and the weights [N, K] that these stand for; None for
# them where the blocks behind are given what the checkpoint's own give (`Solving.restore`).
Coded = tuple[Solved, Mapping[str, npt.NDArray[Any]], "torch.Tensor | None"]
# Solves the linear of this name, given its weight W [N, K] and Hessian H [K, K]; without error feedback where
# a reason is given, too.
SolveOne = Callable[[str, "torch.Tensor", "torch.Tensor", str | None], Coded]


@dataclass(frozen=True)
class Solving:
    """What a format solves of a model, and how.

    `settings` name what each linear becomes, `nbytes` are its bytes in the output; both in the order of the
    blocks, and the head last where it is quantized (`head`). `restore` returns the weights of a block that is
    finished, and is None where every H is that of the checkpoint's own inputs. `against` names what is
    rounded without feedback. `passes` is how much work a solve is, by which the time of a run is foretold:
    see forecast.foretell. Linears in `kept` stay as they are.
    """

    settings: Mapping[str, str]
    nbytes: Mapping[str, int]
    solve: SolveOne
    restore: Restore | None
    head: bool = False
    against: str = "round-to-nearest"
    passes: float = 2.0
    kept: Collection[str] = ()


@dataclass(frozen=True)
class Format:
    """What a format of folders adds to a run.

    `write` takes the linears' tensors and why some are rounded to nearest, by name, and returns the bytes of
    the folder's weights, which `opened` reads back and `planned` names.
    """

    solving: Solving
    write: Callable[[Mapping[str, Piece], Mapping[str, str]], int]
    opened: Callable[[], Opened]
    planned: StoredTensors


@dataclass(frozen=True)
class Run:
    """What a run has before it solves anything: the decoder, the windows, what an earlier run has kept."""

    decoder: st.Decoder
    calibration: Calibration
    state: State
    ranks: Ranks


Choose = Callable[[Run], Generator[Event, None, Format]]


def fixed(format_of: Callable[[Calibration], Format]) -> Choose:
    """What chooses the format where a run has nothing left to choose."""

    def choose(begun: Run) -> Generator[Event, None, Format]:
        yield from ()
        return format_of(begun.calibration)

    return choose


def run(
    job: Job,
    choose: Choose,
    ranks: Ranks,
    started: float,
) -> Iterator[Event]:
    """Quantize what `job` has planned, yielding what happens; all `ranks` call it.

    `choose` returns the format for what this run has; all processes call it. `started` is
    time.monotonic() at the begin. A run that is stopped leaves the blocks that it finished beside the output,
    for `resume`, and nothing under the final name.
    """
    with ExitStack() as stack:
        begun = yield from begin(stack, job, ranks)
        chosen = yield from choose(begun)
        yield from solve_blocks(begun, chosen.solving)
        if not ranks.first:
            return
        nbytes = chosen.write(*collected(begun.state))
    yield Finished(str(job.out), nbytes, time.monotonic() - started)
    yield from prove_folder(job, chosen.opened, chosen.planned)
    check_unchanged(job.model.checkpoint.seen)  # else something else was proven


def begin(stack: ExitStack, job: Job, ranks: Ranks) -> Generator[Event, None, Run]:
    """Open the decoder, draw the windows, open the state, which `stack` closes."""
    drawn: Calibration | None = None
    with ranks.together():
        decoder = open_decoder(job, ranks)
        if ranks.first:
            drawn = yield from draw(job)
    calibration = ranks.shared(drawn)
    assert calibration is not None  # an error has ended all
    by = f", {ranks.count} processes" if ranks.count > 1 else ""
    yield Step(f"calibrating on {calibration.report.tokens:,} tokens of {calibration.report.text}{by}")
    with ranks.together():  # the others read what the first one keeps
        state = State(state_folder(job.out))
        if ranks.first:
            known = identity(job, calibration, decoder, ranks)
            state = stack.enter_context(open_state(job.out, known, job.run.resume))
    return Run(decoder, calibration, state, ranks)


def draw(job: Job) -> Generator[Event, None, Calibration]:
    """The calibration windows, compared with those of the proof; a chat file goes through the model's own
    template.
    """
    data, config = job.tokenizer, job.model.config
    wanted = replace(job.run.calibration, bos=data.first_id)
    judged = default_windows(data.encode, config, data.first_id).tokens
    return (yield from calibrate(wanted, data.encode, config.context_length, judged, data.render))


def open_decoder(job: Job, ranks: Ranks) -> st.Decoder:
    """The language model on the device asked for, in the device's own type."""
    device = st.pick_device(ranks.device(job.run.device))
    return st.open_decoder(job.model.source, job.model.config, device, st.pick_dtype(None, device))


def identity(job: Job, calibration: Calibration, decoder: st.Decoder, ranks: Ranks) -> dict[str, Any]:
    """What a resumed run must have in common with the one that began."""
    return {
        "model": model_digest(job.model.checkpoint),
        "options": f"{job.settings}, {decoder.device.type} {decoder.dtype}, {ranks.count} processes",
        "calibration": calibration.report.fingerprint,
        "version": __version__,
    }


def solve_blocks(run: Run, chosen: Solving) -> Generator[Event, None, None]:
    """Quantize every block that the state does not hold yet, then the head where the format says so."""

    reached = running(run.decoder, chosen.nbytes)

    def solve(name: str, W: torch.Tensor, group: Group) -> Generator[Event, None, Solution]:
        started, few = time.monotonic(), too_few(group)
        solved, tensors, weight = chosen.solve(name, W, group.moment, few)
        figures = (solved.loss, solved.rtn_loss, solved.damp, solved.dead, solved.fell_back)
        event = LinearSolved(name, chosen.settings[name], *figures, time.monotonic() - started)
        yield event
        nbytes = (chosen.nbytes[name], reached[name], sum(chosen.nbytes.values()))
        yield TensorDone(name, chosen.settings[name], *nbytes)
        if solved.fell_back and not few:  # of those it is said once for a block
            yield Warn(f"{name} is left to {chosen.against}: {solved.fell_back}")
        record = {key: value for key, value in event.as_dict().items() if key != "seconds"}
        if few:
            record["tokens"] = group.rows
        return {tensor: from_array(array) for tensor, array in tensors.items()}, record, weight

    rest = (chosen.restore, chosen.head, run.ranks, chosen.against, chosen.passes, chosen.kept)
    yield from quantize_blocks(run.decoder, run.calibration.tokens, run.state, solve, *rest)
