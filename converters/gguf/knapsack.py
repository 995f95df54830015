"""The types of a file chosen by what they cost: measured or taken from a file, shared out, and told of.

`typed` is called before anything else that hangs on the types: it gives a job whose outputs have them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from converters.gguf import budget as budgets
from converters.gguf import mixtures
from converters.gguf.budget import USUAL, Types
from converters.gguf.calibrate import draw_windows, plan_measured
from converters.gguf.file_types import MIXTURES
from converters.gguf.layout import BY_COST, KeyValues, padded
from converters.gguf.plan import Job, with_keys
from converters.gguf.qtypes import QTYPES
from dsconvert.calibration.record import Calibration
from dsconvert.checkpoints.output_plan import look
from dsconvert.errors import UsageError
from dsconvert.events import Event, Step, TypesChosen
from dsconvert.memory.peak import left_on_card
from dsconvert.memory.runtimes import RUNTIMES
from dsconvert.models.language_model import language_model
from dsconvert.quantization.budget import POINTS, Budget, Chosen, Nats, choose, thinned, told
from dsconvert.quantization.cost_file import Known, load, save
from dsconvert.quantization.ranks import Ranks

if TYPE_CHECKING:
    from converters.gguf.costs import Costs

RESERVE = 1024  # bytes for the keys that a solver still adds
IMATRIX = "imatrix"


def typed_everywhere(job: Job, ranks: Ranks) -> Generator[Event, None, Job]:
    """As `typed`, on all processes; the first one measures."""
    found: Job | None = None
    with ranks.together():
        if ranks.first:
            found = yield from typed(job)
    told = ranks.shared(None if found is None else (found.options.budget, found.keys, found.importance))
    if found is not None:
        return found
    assert told is not None  # an error of the first process has ended this one
    budget, keys, importance = told
    return with_keys(replace(job, options=replace(job.options, budget=budget), importance=importance), keys)


def typed(job: Job) -> Generator[Event, None, Job]:
    """The job with types of least foretold cost within its budget, the keys that tell so, and the importance
    of embedding and head; one without a budget as it is.

    Raises UsageError for a budget that is too small, CheckpointError for a measurement of another model.
    """
    asked, solver = job.options.budget, job.options.solver
    if asked is None:
        return job
    types = budgets.candidates(asked, job.specs, job.options.overrides)
    known = None
    if asked.measurement is not None and look(asked.measurement) is not None:
        known = load(asked.measurement, _shapes(job, types), types, solver)
        yield Step(f"taking the costs in {asked.measurement}")
    drawn = None
    if not job.options.dry_run:
        job, drawn = yield from plan_measured(job)
    if known is None:
        known = yield from _measured(job, types, drawn)
    job = replace(job, importance={**job.importance, **known.importance})
    job, found = share_out(job, asked, types, known.nats, RESERVE if solver != IMATRIX else 0)
    yield from _told(job, asked, types, known.nats, found)
    return job


def _measured(job: Job, types: Types, drawn: Calibration | None) -> Generator[Event, None, Known]:
    """The costs on the calibration text, and into the file that was asked for."""
    from converters.gguf import costs
    from dsconvert.decoder import torch_decoder as st

    options = job.options
    if options.calibration is None or options.dry_run:
        raise UsageError(
            "types are chosen by what they cost on text",
            why="--dry-run runs nothing" if options.dry_run else "No text is named",
            hint="Give --calib c4, or --measurement FILE of an earlier run",
        )
    if drawn is None:  # no tensor takes importance
        drawn = yield from draw_windows(options.calibration, job.tokenizer, job.config.context_length)
    source, config = language_model(job.checkpoint, job.config)
    place = st.pick_device(options.device)
    decoder = st.open_decoder(source, config, place, st.pick_dtype(None, place))
    wanted = {gguf: tuple(QTYPES[kind] for kind in kinds) for gguf, kinds in types.items()}
    yield Step(f"measuring what types cost on {min(len(drawn.tokens), costs.WINDOWS)} windows")
    feedback, seed = options.solver != IMATRIX, options.calibration.seed
    found: Costs = yield from costs.measure(decoder, drawn.tokens, wanted, feedback=feedback, seed=seed)
    known = Known(found.nats, found.importance)
    if options.budget is not None and options.budget.measurement is not None:
        save(options.budget.measurement, known, _shapes(job, types), options.solver)
        yield Step(f"wrote the costs to {options.budget.measurement}")
    return known


def _shapes(job: Job, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    tensors = job.outputs[0].tensors
    return {name: tensors[name].shape for name in names}


def share_out(job: Job, asked: Budget, types: Types, nats: Nats, reserve: int = 0) -> tuple[Job, Chosen]:
    """The job with types of least cost, its files and `reserve` more bytes within what was asked."""
    shapes = _shapes(job, types)
    among = sum(map(prod, shapes.values()))
    weights = sum(prod(tensor.shape) for tensor in job.outputs[0].tensors.values())
    limit = asked.size
    if asked.vram is not None:
        context = asked.context or job.config.context_length
        limit = left_on_card(job.config, RUNTIMES["llama.cpp"], asked.vram, context)
    job = with_keys(job, _keys(asked, 0.0, [(0, 0.0)] * POINTS))  # as many bytes as the final ones
    over = 0
    while True:
        if asked.bpw is not None:
            bits = int(asked.bpw * weights) - 8 * _others(job, types)
        else:
            bits = 8 * ((limit or 0) - _around(job, types) - reserve - over)
        found = choose(budgets.options_of(types, shapes, nats), among, bits, asked.words)
        fixed = _around(job, types)
        curve = [(fixed + corner // 8, cost) for corner, cost in thinned(found.curve)]
        chosen = replace(asked, chosen=found.types)
        job = replace(job, options=replace(job.options, budget=chosen))
        job = with_keys(job, _keys(asked, found.nats, curve))
        excess = 0 if asked.bpw is not None else _nbytes(job) - (limit or 0)
        if excess <= 0:
            return job, found
        over += excess  # files that are split have more heads, by how they are split


def _nbytes(job: Job) -> int:
    return sum(layout.nbytes for layout in job.outputs[0].layouts)


def _around(job: Job, types: Types) -> int:
    """Bytes of the files but for the tensors whose types are chosen."""
    tensors = job.outputs[0].tensors
    return _nbytes(job) - sum(padded(tensors[name].nbytes) for name in types)


def _others(job: Job, types: Types) -> int:
    """Bytes of the tensors whose types are not chosen."""
    return sum(padded(t.nbytes) for name, t in job.outputs[0].tensors.items() if name not in types)


def _keys(asked: Budget, nats: float, curve: list[tuple[int, float]]) -> KeyValues:
    """What the file says of how its types were chosen; of one size for one request."""
    filled = curve + curve[-1:] * (POINTS - len(curve))
    return {
        BY_COST + "asked": ("string", asked.words),
        BY_COST + "candidates": ("array:string", list(asked.types or USUAL)),
        BY_COST + "floor": ("string", asked.floor or ""),
        BY_COST + "foretold_kl": ("float32", nats),
        BY_COST + "curve_bytes": ("array:uint64", [nbytes for nbytes, _ in filled]),
        BY_COST + "curve_kl": ("array:float32", [cost for _, cost in filled]),
    }


def by_rule(job: Job, types: Types, nats: Nats) -> Iterator[tuple[str, int, float]]:
    """Name, file size and foretold nats of each mixture of llama-quantize whose types have costs."""
    tensors = job.outputs[0].tensors
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    around = _around(job, types)
    for quant in MIXTURES:
        choices = mixtures.choose_for(job.config, quant, shapes, imatrix=True)
        if all(choices[name].type in nats[name] for name in types):
            size = sum(budgets.tensor_bits(shapes[name], choices[name].type) // 8 for name in types)
            yield quant, around + size, math.fsum(nats[name][choices[name].type] for name in types)


def _told(job: Job, asked: Budget, types: Types, nats: Nats, found: Chosen) -> Iterator[Event]:
    """What was chosen, what other sizes would give, and what llama-quantize's mixtures would."""
    weights = sum(prod(tensor.shape) for tensor in job.outputs[0].tensors.values())
    data = sum(tensor.nbytes for tensor in job.outputs[0].tensors.values())
    around = _around(job, types)
    curve = tuple((around + bits // 8, cost) for bits, cost in thinned(found.curve))
    rules = tuple(sorted(by_rule(job, types, nats), key=lambda rule: rule[1]))
    event = TypesChosen(asked.words, 8 * data / weights, _nbytes(job), found.nats, curve, rules)
    yield from told(event, "llama-quantize's mixtures")
