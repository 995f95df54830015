"""Reading, quantizing and writing at once: row chunks on a thread pool, each written where it belongs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf import kernels
from converters.gguf.plan import Job
from converters.gguf.qtypes import QType
from dsconvert.checkpoints.output_files import PartFile
from dsconvert.errors import QuantizationError
from dsconvert.events import Event, Step, TensorDone, Warn
from dsconvert.machine import collector_paused, usable_cores
from dsconvert.models.tensor_table import rounded

CHUNK = 1 << 20  # values: 2 MB of bf16 in, well under 4 MB out for every type
PROJECTOR = ("v.", "mm.")  # how the tensors of a projector file begin


@dataclass(frozen=True)
class Target:
    """Where one quantization of a tensor goes."""

    qtype: QType
    part: PartFile
    offset: int


@dataclass(frozen=True)
class Chunk:
    """Some leading units (rows, or heads of rows) of one source tensor, and its targets."""

    name: str
    source: str
    view: npt.NDArray[Any]
    start: int
    targets: tuple[Target, ...]
    last: bool
    importance: npt.NDArray[np.float32] | None = None


def write_tensors(job: Job, parts: list[PartFile]) -> Iterator[Event]:
    """Write headers and all tensors of all outputs, reading each source tensor once.

    Raises QuantizationError naming a tensor with a NaN, an infinity (unless allowed) or a value that
    float16 cannot hold; OutputError when the disk refuses.
    """
    for layout, part in zip(job.layouts, parts, strict=True):
        part.write(layout.head, 0)
    yield from _warm(job)
    done, total, warned = 0, job.source_nbytes, set[str]()
    work = (lambda chunk=chunk: (chunk, _run(chunk)) for chunk in _chunks(job, parts))
    for chunk, flags in _pump(work, job.options.threads or usable_cores()):
        done += chunk.view.nbytes
        _refuse(chunk, flags, job.options.allow_nonfinite)
        if flags and chunk.name not in warned:
            warned.add(chunk.name)
            yield Warn(
                f"{chunk.source} holds NaN or infinite values; they were kept as --allow-nonfinite says"
            )
        if chunk.last:
            for target in chunk.targets:
                size = target.qtype.nbytes(_values(job, chunk.name))
                yield TensorDone(chunk.name, target.qtype.name, size, done, total)


def _values(job: Job, name: str) -> int:
    output = next(output for output in job.every_output if name in output.tensors)
    return int(np.prod(output.tensors[name].shape))


def _warm(job: Job) -> Iterator[Event]:
    """Compile what is not in the cache yet, before the threads need it, and say so."""
    kinds = {
        (tensor.qtype, tensor.name in job.importance and kernels.takes_importance(tensor.qtype))
        for output in job.every_output
        for tensor in output.tensors.values()
    }
    sources = {job.checkpoint.dtype(spec.hf) for spec, _ in job.tensors} | ({"f32"} if job.derived else set())
    sources = {"f32" if source == "f64" else source for source in sources}
    for source, weighted in product(sorted(sources), (False, True)):
        qtypes = {qtype for qtype, with_importance in kinds if with_importance == weighted}
        if not kernels.compiled(qtypes, source, weighted):
            names = ", ".join(sorted(qtype.name for qtype in qtypes)) + " with importance" * weighted
            yield Step(f"compiling kernels {source} -> {names} (the first time; kept in the cache folder)")
        with collector_paused():
            kernels.warm(qtypes, source, weighted)


def _chunks(job: Job, parts: list[PartFile]) -> Iterator[Chunk]:
    """The whole work in the order of the files, so that reading and writing both run forward."""
    for spec, config in job.tensors:
        view = spec.forward(job.checkpoint.raw(spec.hf), config)
        targets = _targets(job, parts, spec.gguf)
        for chunk in _split(spec.gguf, spec.hf, view, targets):
            yield replace(chunk, importance=job.importance.get(spec.gguf))
    for name, values in job.derived.items():
        yield from _split(name, name, values, _targets(job, parts, name))


def _targets(job: Job, parts: list[PartFile], name: str) -> tuple[Target, ...]:
    targets, first = [], 0
    for output in job.every_output:
        if name in output.tensors:
            number, offset = output.place(name)
            targets.append(Target(output.tensors[name].qtype, parts[first + number], offset))
        first += len(output.layouts)
    return tuple(targets)


def _split(name: str, source: str, view: npt.NDArray[Any], targets: tuple[Target, ...]) -> Iterator[Chunk]:
    unit = view[:1].size
    step = max(1, CHUNK // unit) if view.ndim > 1 and unit > 1 else len(view)
    for start in range(0, len(view), step):
        part = view[start : start + step]
        yield Chunk(name, source, part, start * unit, targets, start + step >= len(view))


def _run(chunk: Chunk) -> int:
    """Quantize and write one chunk; runs on a worker thread."""
    columns = chunk.view.shape[-1]
    flags = 0
    rows = np.require(rounded(chunk.view), requirements=["C", "A"]).reshape(-1, columns)
    for target in chunk.targets:
        out = np.empty((len(rows), target.qtype.nbytes(columns)), np.uint8)
        flags |= kernels.quantize(target.qtype, rows, out, chunk.importance)
        target.part.write(out.data, target.offset + target.qtype.nbytes(chunk.start))
    return flags


def _refuse(chunk: Chunk, flags: int, allow_nonfinite: bool) -> None:
    if flags & kernels.NONFINITE and not allow_nonfinite:
        raise QuantizationError(
            "holds NaN or infinite values",
            where=chunk.source,
            why="A model with such weights answers nonsense or nothing",
            hint="Fetch the shard again; to convert it all the same give --allow-nonfinite",
        )
    if flags & kernels.OVERFLOW:
        names = ", ".join(target.qtype.name for target in chunk.targets)
        option = f"--tensor-type '{chunk.name}=f32' (or bf16)"
        if chunk.name.startswith(PROJECTOR):
            option = "--mmproj-quant bf16 or f32"
        raise QuantizationError(
            f"holds values too large for the float16 numbers of type {names}",
            where=chunk.source,
            hint=f"Keep this tensor in 32 bits: {option}",
        )


def _pump(work: Iterable[Callable[[], tuple[Chunk, int]]], threads: int) -> Iterator[tuple[Chunk, int]]:
    """Run `work` on `threads` threads, a bounded number ahead, giving results in order."""
    with ThreadPoolExecutor(threads, thread_name_prefix="quantize") as pool:
        pending: deque[Future[tuple[Chunk, int]]] = deque()
        try:
            for item in work:
                pending.append(pool.submit(item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
