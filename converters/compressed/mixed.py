"""The scheme of each linear by what it costs: measured or taken from a file, shared out, and told of."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from math import fsum

from converters.compressed import costs
from converters.compressed.choice import INDEXER, chosen, options_of
from converters.compressed.plan import Job
from dsconvert.events import Event, Step, TypesChosen
from dsconvert.quantization.budget import Chosen, Nats, choose, thinned, told
from dsconvert.quantization.cost_file import Known, save
from dsconvert.quantization.run import Run


def typed(job: Job, begun: Run) -> Generator[Event, None, Job]:
    """The job with schemes of least foretold cost within its budget; all processes call it.

    The first one measures. Raises what measuring raises.
    """
    nats: Nats | None = None
    ranks = begun.ranks
    with ranks.together():
        if ranks.first:
            nats = yield from measured(job, begun)
    nats = ranks.shared(nats)
    asked = job.options.budget
    assert asked is not None  # only a job with a budget comes here
    assert nats is not None  # an error of the first process has ended this one
    shapes = job.model.shapes
    parts = options_of(shapes, job.choices, nats)
    found = choose(parts, job.weights, job.allowed_bits, asked.words)
    job = replace(job, schemes=chosen(shapes, job.choices, found.types))
    event = told_of(job, found, nats)
    yield from told(event, "one scheme for all linears")
    nbytes, kl = zip(*event.curve, strict=True)
    said = {
        "asked": event.asked,
        "candidates": list(dict.fromkeys(label for own in job.choices.values() for label in own)),
        "foretold_kl": event.nats,
        "curve_bytes": list(nbytes),
        "curve_kl": list(kl),
    }
    return replace(job, told=said)


def measured(job: Job, begun: Run) -> Generator[Event, None, Nats]:
    """The costs that were given, or those of the calibration text, which the file asked for then keeps."""
    asked = job.options.budget
    path = asked.measurement if asked is not None else None
    if job.known is not None:
        yield Step(f"taking the costs in {path}")
        return job.known.nats
    found = yield from costs.measure(begun, job.options, job.choices)
    if path is not None:
        save(path, Known(found), job.model.shapes, job.measured_by)
        yield Step(f"wrote the costs to {path}")
    return found


def told_of(job: Job, found: Chosen, nats: Nats) -> TypesChosen:
    """What was chosen, what other sizes would give, and what one scheme for all linears would."""
    asked, kept = job.options.budget, job.model.kept_nbytes
    assert asked is not None  # as in `typed`
    curve = tuple((kept + bits // 8, cost) for bits, cost in thinned(found.curve))
    rules = tuple(sorted(_alike(job, nats), key=lambda rule: rule[1]))
    return TypesChosen(asked.words, found.bits / job.weights, job.total, found.nats, curve, rules)


def _alike(job: Job, nats: Nats) -> Iterator[tuple[str, int, float]]:
    """Name, bytes and foretold nats of each scheme that all linears may have."""
    free = {name: own for name, own in job.choices.items() if INDEXER not in name}
    for label, scheme in next(iter(free.values()), {}).items():
        if all(label in own for own in free.values()):
            alike = replace(job, schemes={**job.schemes, **dict.fromkeys(free, scheme)})
            yield label, alike.total, fsum(nats[name][label] for name in free)
