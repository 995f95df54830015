"""The flow of `dsconvert gguf`: plan everything, write in one pass, prove."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace

from converters.gguf.layout import is_gguf
from converters.gguf.modelfile import write_modelfiles
from converters.gguf.output import Options
from converters.gguf.plan import Job, prepare
from converters.gguf.projector.keys import CANNOT
from converters.gguf.write import write_tensors
from dsconvert.checkpoints.output_files import PartFile, part_files
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.events import Event, Finished, Planned, Step, TensorPlan, Warn, phase
from dsconvert.libraries import TORCH, lacking
from dsconvert.quantization.budget import beside_foretold
from dsconvert.quantization.ranks import ALONE, Ranks


def convert(options: Options, ranks: Ranks = ALONE) -> Iterator[Event]:
    """Convert a checkpoint to GGUF as `options` say, yielding what happens.

    Of several `ranks`, which --solver gptq alone makes use of, the first writes and proves. Raises
    ConversionError before the first byte is written for everything that can be known by then; whatever
    happens later, no incomplete file is left under a final name.

    >>> from pathlib import Path
    >>> from converters.gguf.output import Options
    >>> events = list(convert(Options("sample:", ("q8_0",), Path("sample-q8_0.gguf"))))
    >>> Path("sample-q8_0.gguf").stat().st_size
    2978976
    """
    started = time.monotonic()
    with ranks.together():
        job = prepare(options)
        if not options.dry_run and lacking(*TORCH):
            from converters.gguf.proof import check_libraries  # else what proves is loaded after the work

            check_libraries(job)
    if options.budget is not None:
        from converters.gguf.knapsack import typed_everywhere  # what measures is not loaded for others

        job = yield from typed_everywhere(job, ranks)
    if options.dry_run or options.calibration is None:
        yield from describe(job)
    if options.dry_run:
        return
    if options.solver == "gptq":
        found = yield from solve_and_write(job, ranks)
        if found is None:
            return
        job = found
    else:
        if options.calibration is not None:
            job = yield from measure_weights(job)
        yield from write_files(job, lambda parts: write_tensors(job, parts))
    sizes = [layout.nbytes for layout in job.layouts]
    for path, size in zip(job.paths, sizes, strict=True):
        yield Finished(str(path), size, time.monotonic() - started)
    if options.ollama:
        yield from write_modelfiles(job)
    from converters.gguf.proof import prove  # not loaded for --dry-run, and not before the work

    yield from beside_foretold(prove(job), job.foretold)
    check_unchanged(job.checkpoint.seen)  # else something else was proven
    if job.projector is not None and job.towers is not None and not job.towers.readable:
        yield Warn(CANNOT)


def write_files(job: Job, write: Callable[[list[PartFile]], Iterator[Event]]) -> Iterator[Event]:
    """Let `write` fill all files, which appear when they are whole and the checkpoint has not changed."""
    sizes = [layout.nbytes for layout in job.layouts]
    with part_files(job.paths, sizes, job.options.force, job.inputs, is_gguf) as parts:
        with phase("write"):
            yield from write(parts)
        check_unchanged(job.checkpoint.seen)


def solve_and_write(job: Job, ranks: Ranks) -> Generator[Event, None, Job | None]:
    """Solve the linears, write the files; the job as it is written, None on all processes but the first."""
    from converters.gguf import solved  # what calibrates is not loaded for others

    with ExitStack() as stack:
        begun = yield from solved.start(stack, job, ranks)
        yield from describe(begun.job)
        yield from solved.solve_all(begun)
        if not ranks.first:
            return None
        job, pieces = solved.finished(begun)
        others = solved.rest_of(begun)

        def write(parts: list[PartFile]) -> Iterator[Event]:
            solved.write_solved(begun, job, pieces, parts)
            yield from write_tensors(
                replace(job, specs=tuple(s for s in job.specs if s.gguf in others)), parts
            )

        yield from write_files(job, write)
    return job


def measure_weights(job: Job) -> Generator[Event, None, Job]:
    """Describe the job and give it the importance matrix that is made on the way."""
    from converters.gguf.calibrate import plan_measured, weighed  # what calibrates is not loaded for others

    job, drawn = yield from plan_measured(job)
    yield from describe(job)
    return (yield from weighed(job, drawn))


def describe(job: Job) -> Iterator[Event]:
    """What will be written, to the byte, and what the user should know before it is."""
    for note in job.notes:
        yield Warn(note)
    if job.options.dry_run and job.options.calibration is not None:
        yield Step("the keys that describe the calibration text come on top of the sizes: 1 to 2 kB")
    yield from map(Step, job.towers.left_out if job.towers is not None else ())
    sources = {spec.gguf: spec for spec in job.tensors}
    names = {name for spec in job.towers.specs for name in spec.names} if job.towers is not None else set()
    tower_nbytes = sum(job.checkpoint.tensors[name].nbytes for name in names)
    for output in job.every_output:
        rows = []
        for tensor in output.tensors.values():
            spec = sources.get(tensor.name)
            hf, kind = (spec.hf, job.checkpoint.dtype(spec.names[0])) if spec else ("", "derived")
            rows.append(TensorPlan(tensor.name, hf, tensor.shape, kind, tensor.qtype.name, tensor.nbytes))
        files = tuple(map(str, output.paths))
        sizes = tuple(layout.nbytes for layout in output.layouts)
        source = job.checkpoint.nbytes - tower_nbytes if output in job.outputs else tower_nbytes
        pre = job.pre if output in job.outputs else ""
        yield Planned(files, output.quant, tuple(rows), sizes, source, pre)
        for change, count in output.fallbacks.items():
            why = f"({change}): their rows are not a multiple of its block"
            yield Warn(f"{count} tensors of {output.quant} take another type {why}")
