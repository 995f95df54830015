"""Reading, quantizing and writing at once: row chunks on a thread pool, each written where it belongs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt

from converters.gguf import kernels
from converters.gguf.plan import Job
from converters.gguf.qtypes import QType
from dsconvert.checkpoints.output_files import PartFile
from dsconvert.errors import QuantizationError
from dsconvert.events import Event, Step, TensorDone, Warn, phase
from dsconvert.machine import collector_paused, usable_cores
from dsconvert.models.stored_rows import chunks, stored_rows
from dsconvert.models.weights import Array

CHUNK = 1 << 20  # values: 2 MB of bf16 in, well under 4 MB out for every type
Importance = npt.NDArray[np.float32]
PROJECTOR = ("v.", "mm.")  # how the tensors of a projector file begin


@dataclass(frozen=True)
class Target:
    """Where one quantization of a tensor goes."""

    qtype: QType
    part: PartFile
    offset: int


@dataclass(frozen=True)
class Chunk:
    """Some rows of one tensor, and its targets.

    `read` returns them, [rows, columns]; `start` is the place of the first value, `nbytes` what
    they take in the checkpoint. Of a stack each matrix has `height` rows and an `importance` of its own.
    """

    name: str
    source: str
    read: Callable[[], Array]
    start: int
    nbytes: int
    targets: tuple[Target, ...]
    last: bool
    importance: Importance | None = None
    height: int = 0


def write_tensors(job: Job, parts: list[PartFile]) -> Iterator[Event]:
    """Write headers and all tensors of all outputs, reading each source tensor once.

    Raises QuantizationError naming a tensor with a NaN, an infinity (unless allowed) or a value that
    float16 cannot hold; OutputError when the disk refuses.
    """
    for layout, part in zip(job.layouts, parts, strict=True):
        part.write(layout.head, 0)
    with phase("kernels"):
        yield from _warm(job)
    done, total, warned = 0, job.source_nbytes, set[str]()
    work = (lambda chunk=chunk: (chunk, _run(chunk)) for chunk in _chunks(job, parts))
    for chunk, flags in _pump(work, job.options.threads or usable_cores()):
        done += chunk.nbytes
        kinds = ", ".join(target.qtype.name for target in chunk.targets)
        refuse(flags, chunk.source, chunk.name, kinds, job.options.allow_nonfinite)
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
    read = {name for spec in job.tensors for name in spec.names}
    sources = {kernels.source_of(job.checkpoint.rows(name, 0, 0)) for name in read}
    sources |= {"f32"} if job.derived else set()
    for source, weighted in product(sorted(sources), (False, True)):
        qtypes = {qtype for qtype, with_importance in kinds if with_importance == weighted}
        if not kernels.compiled(qtypes, source, weighted):
            names = ", ".join(sorted(qtype.name for qtype in qtypes)) + " with importance" * weighted
            yield Step(f"compiling kernels {source} -> {names} (the first time; kept in the cache folder)")
        with collector_paused():
            kernels.warm(qtypes, source, weighted)


def _chunks(job: Job, parts: list[PartFile]) -> Iterator[Chunk]:
    """The whole work in the order of the files, so that reading and writing both run forward."""
    for spec in job.tensors:
        places, nbytes = targets(job, parts, spec.gguf), job.nbytes_of(spec)
        columns, importance = spec.values // spec.rows, job.importance.get(spec.gguf)
        for start, stop in chunks(spec, CHUNK):
            read = partial(stored_rows, spec, job.checkpoint.rows, start, stop)
            share = nbytes * stop // spec.rows - nbytes * start // spec.rows
            last = stop == spec.rows
            source = spec.names[start * spec.many // spec.rows]
            yield Chunk(
                spec.gguf,
                source,
                read,
                start * columns,
                share,
                places,
                last,
                importance,
                spec.rows // spec.shape[0],
            )
    for name, values in job.derived.items():
        yield Chunk(name, name, partial(np.reshape, values, (-1, 1)), 0, 0, targets(job, parts, name), True)


def targets(job: Job, parts: list[PartFile], name: str) -> tuple[Target, ...]:
    """Where a tensor goes, in the order of the outputs that have it."""
    found, first = [], 0
    for output in job.every_output:
        if name in output.tensors:
            number, offset = output.place(name)
            found.append(Target(output.tensors[name].qtype, parts[first + number], offset))
        first += len(output.layouts)
    return tuple(found)


def _run(chunk: Chunk) -> int:
    """Quantize and write one chunk; runs on a worker thread."""
    rows, flags = chunk.read(), 0
    parts = list(_by_matrix(chunk, len(rows), rows.shape[1]))
    for target in chunk.targets:
        out = np.empty((len(rows), target.qtype.nbytes(rows.shape[1])), np.uint8)
        for part, importance in parts:
            flags |= kernels.quantize(target.qtype, rows[part], out[part], importance)
        target.part.write(out.data, target.offset + target.qtype.nbytes(chunk.start))
    return flags


def _by_matrix(chunk: Chunk, count: int, columns: int) -> Iterator[tuple[slice, Importance | None]]:
    """The rows of a chunk by the matrices of a stack that they are of, each with its own importance."""
    if chunk.importance is None or chunk.importance.ndim == 1:
        yield slice(0, count), chunk.importance
        return
    first = chunk.start // columns
    for number in range(first // chunk.height, -(-(first + count) // chunk.height)):
        start, stop = max(number * chunk.height - first, 0), min((number + 1) * chunk.height - first, count)
        yield slice(start, stop), chunk.importance[number]


def refuse(flags: int, source: str, name: str, kinds: str, allow_nonfinite: bool = False) -> None:
    """Raise QuantizationError where the kernels' `flags` tell of values that the types cannot hold."""
    if flags & kernels.NONFINITE and not allow_nonfinite:
        raise QuantizationError(
            "holds NaN or infinite values",
            where=source,
            why="A model with such weights answers nonsense or nothing",
            hint="Fetch the shard again; to convert it all the same give --allow-nonfinite",
        )
    if flags & kernels.OVERFLOW:
        option = f"--tensor-type '{name}=f32' (or bf16)"
        if name.startswith(PROJECTOR):
            option = "--mmproj-quant bf16 or f32"
        raise QuantizationError(
            f"holds values too large for the scales or numbers of type {kinds}",
            where=source,
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
