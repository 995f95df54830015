"""The events that a conversion yields: one stream feeds the progress bar, `--json`, reports and tests."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

LOG = logging.getLogger("dsconvert")  # what --debug shows


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Log how long a part of the work took, on the clock and of the process's processors."""
    started, used = time.perf_counter(), time.process_time()
    yield
    seconds, busy = time.perf_counter() - started, time.process_time() - used
    LOG.debug("%-24s %6.3f s, %6.3f s of processor", name, seconds, busy)


@dataclass(frozen=True)
class Event:
    """Something that happened; `as_dict` is its JSON form with the kind under "event"."""

    def as_dict(self) -> dict[str, Any]:
        return {"event": type(self).__name__.lower(), **asdict(self)}


@dataclass(frozen=True)
class TensorPlan(Event):
    """One output tensor: names, shape (rows first), source and target type, bytes in the output."""

    name: str
    source: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    nbytes: int


@dataclass(frozen=True)
class Planned(Event):
    """Everything is known and nothing is written yet; `nbytes` is the exact size of each output file."""

    outputs: tuple[str, ...]
    quant: str
    tensors: tuple[TensorPlan, ...]
    nbytes: tuple[int, ...]
    source_nbytes: int
    pre_tokenizer: str = ""


@dataclass(frozen=True)
class TypesChosen(Event):
    """The types of a file were chosen by cost: its size, and the KL divergence (nats) that is foretold of it.

    `curve` is what other sizes would buy, pairs of bytes and nats; `rules` are llama-quantize's mixtures by
    the same measure: name, bytes, nats.
    """

    asked: str
    bits_per_weight: float
    nbytes: int
    nats: float
    curve: tuple[tuple[int, float], ...]
    rules: tuple[tuple[str, int, float], ...]


@dataclass(frozen=True)
class Foretold(Event):
    """The KL divergence that was foretold of a file, in nats, and the one that its proof measured."""

    nats: float
    measured: float


@dataclass(frozen=True)
class Step(Event):
    """A stage without a measure of its own begins (compiling kernels, syncing, verifying)."""

    text: str


@dataclass(frozen=True)
class TensorDone(Event):
    """One tensor is written; `done` and `total` count source bytes over the whole run."""

    name: str
    type: str
    nbytes: int
    done: int
    total: int


@dataclass(frozen=True)
class Warn(Event):
    """Something the user should know, and what to do about it."""

    text: str


@dataclass(frozen=True)
class Finished(Event):
    """A file stands complete under its final name."""

    path: str
    nbytes: int
    seconds: float
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Proven(Event):
    """The proof of one output has ended: what it is, whether all checks held, and what it was held against.

    `figures` are those of a run of the whole model, None where it was not run so. `base` is the checkpoint's
    name on the hub and `commit` its revision, as far as they are known; `folder` is where it was read.
    """

    path: str
    kind: str
    quant: str
    nbytes: int
    bits: float
    passed: bool
    model: str
    base: str
    commit: str
    folder: str
    figures: dict[str, Any] | None
    provenance: dict[str, str]


@dataclass(frozen=True)
class Fetched(Event):
    """What was read of a model over the network: bytes, in how many answers, how many of them anew."""

    name: str
    nbytes: int
    answers: int
    again: int


@dataclass(frozen=True)
class BlockRun(Event):
    """One decoder block has run; `index` counts from 0 to `layers` - 1."""

    index: int
    layers: int


@dataclass(frozen=True)
class BlockCompared(BlockRun):
    """One decoder block of both models has run: the relative error of its states and their cosine."""

    relative: float
    cosine: float


@dataclass(frozen=True)
class Check(Event):
    """One line of the proof: what was compared, whether it held, and the figure."""

    name: str
    passed: bool
    detail: str
    value: float | None = None
