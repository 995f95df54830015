"""The report of a proof, and its JSON form; `dsconvert.report.page` makes the HTML page of it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dsconvert.checkpoints.output_files import write_file
from dsconvert.checkpoints.output_plan import check_distinct, check_files, check_side_file
from dsconvert.errors import ConversionError
from dsconvert.proof.checks import Verdict
from dsconvert.proof.compare import Comparison
from dsconvert.proof.figures import Figures
from dsconvert.proof.thresholds import Thresholds
from dsconvert.reading import parse_json, read_head, read_text
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    from dsconvert.proof.runtime import EngineFigures

Decode = Callable[[Sequence[int]], str]
WORST, CONTEXT = 20, 24
GENERATOR = '<meta name="generator" content="dsconvert">'  # what a page of ours is known by
JSON_LIMIT = 1 << 30
# The keys by which JSON of ours is known: events, a proof, a comparison, `inspect`, `tokenizer`.
JSON_KEYS = (
    {"event"},
    {"title", "passed", "provenance"},
    {"title", "outputs"},
    {"files", "pairing_id"},
    {"file", "kind", "runtime"},
)


@dataclass(frozen=True)
class TypeSize:
    """How much of an output a type takes."""

    type: str
    tensors: int
    weights: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """Everything a report shows; `decode` turns ids into text, `provenance` is shown as it is."""

    title: str
    comparison: Comparison
    verdict: Verdict
    limits: Thresholds
    windows: Windows
    sizes: tuple[TypeSize, ...] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    engine: EngineFigures | None = None
    decode: Decode | None = None


@dataclass(frozen=True)
class WorstToken:
    """A prediction with a large KL divergence: the text before it, what followed, what was expected."""

    window: int
    position: int
    kld: float
    p_base: float
    p: float
    context: str
    target: str
    top_base: str
    top: str


@dataclass(frozen=True)
class Outcome:
    """One of several outputs of the same model; `bits` are bits per weight over all tensors.

    `figures` are None for an output that cannot be run whole.
    """

    name: str
    nbytes: int
    bits: float
    figures: Figures | None
    passed: bool


OUTCOME_COLUMNS = ("output", "MB", "bits per weight", "PPL", "PPL ratio", "mean KLD", "99 % KLD",
                   "same top p", "verdict")  # fmt: skip
OUTCOME_FIGURES = frozenset(range(1, len(OUTCOME_COLUMNS) - 1))  # the columns that hold numbers


def outcome_row(outcome: Outcome) -> tuple[str, ...]:
    """The cells of OUTCOME_COLUMNS, for a page or a terminal."""
    size = (outcome.name, f"{outcome.nbytes / 1e6:.1f}", f"{outcome.bits:.2f}")
    return (*size, *_figure_cells(outcome.figures), "pass" if outcome.passed else "FAIL")


def _figure_cells(figures: Figures | None) -> tuple[str, ...]:
    if figures is None:
        return ("-",) * (len(OUTCOME_COLUMNS) - 4)
    return (
        f"{figures.ppl.value:.4f}",
        f"{figures.ppl_ratio.value:.4f}",
        f"{figures.kld.value:.5f}",
        f"{figures.kld_percentiles['99']:.5f}",
        f"{figures.same_top.value:.2%}",
    )


def worst_tokens(report: Report, count: int = WORST) -> list[WorstToken]:
    """The predictions with the largest KL divergence, worst first."""
    tokens = report.comparison.tokens
    if tokens is None:
        return []
    text = report.decode or (lambda ids: " ".join(map(str, ids)))
    found = []
    for i in np.argsort(-tokens.kld, kind="stable")[:count].tolist():
        window, position = int(tokens.window[i]), int(tokens.position[i])
        before = report.windows.tokens[window, max(0, position + 1 - CONTEXT) : position + 1]
        found.append(
            WorstToken(
                window=window,
                position=position,
                kld=float(tokens.kld[i]),
                p_base=math.exp(-float(tokens.nll_base[i])),
                p=math.exp(-float(tokens.nll[i])),
                context=text(before.tolist()),
                target=text([int(tokens.target[i])]),
                top_base=text([int(tokens.top_base[i])]),
                top=text([int(tokens.top[i])]),
            )
        )
    return found


def sizes_by_type(tensors: Iterable[tuple[str, int, int]]) -> tuple[TypeSize, ...]:
    """Sums over (type, weights, bytes) of every tensor, largest type first."""
    sums: dict[str, list[int]] = {}
    for kind, count, nbytes in tensors:
        row = sums.setdefault(kind, [0, 0, 0])
        row[0], row[1], row[2] = row[0] + 1, row[1] + count, row[2] + nbytes
    rows = [TypeSize(kind, *row) for kind, row in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.nbytes))


def as_dict(report: Report) -> dict[str, Any]:
    """The report for machines; a value that is not finite is null, and a tensor without error says so."""
    found, figures = report.comparison, report.comparison.figures
    value = {
        "title": report.title,
        "passed": report.verdict.passed,
        "reasons": list(report.verdict.reasons),
        "checks": [check.as_dict() for check in report.verdict.checks],
        "limits": asdict(report.limits),
        "figures": None if figures is None else asdict(figures),
        "foretold": None if found.foretold is None else asdict(found.foretold),
        "engine": None if report.engine is None else asdict(report.engine),
        "broken": found.broken,
        "blocks": [asdict(block) for block in found.blocks],
        "tensors": [{**asdict(tensor), "equal": tensor.snr == math.inf} for tensor in found.tensors],
        "worst_tokens": [asdict(token) for token in worst_tokens(report)],
        "sizes": [asdict(size) for size in report.sizes],
        "provenance": dict(report.provenance),
    }
    cleaned: dict[str, Any] = finite(value)
    return cleaned


def finite(value: Any) -> Any:
    """The same structure with null for each float that JSON cannot say."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_targets(
    page: Path | None, json_file: Path | None, inputs: Sequence[Path] = (), base: Path | None = None
) -> None:
    """See that a report's page and its JSON can be written; raises OutputError.

    What exists under these names is overwritten only if it is such a page or such JSON, and none of the
    `inputs` that the command reads. `base`, a file of log-probabilities, is written where there is none.
    """
    named = {path: kind for path, kind in ((page, PAGE), (json_file, JSON)) if path is not None}
    check_distinct([path for path in (page, json_file, base) if path is not None])
    if base is not None and not os.path.lexists(base):
        check_files([base], [0], force=False)
    for path, kind in named.items():
        check_side_file(path, ours=kind.known, kind=kind.name, inputs=inputs)


def save_page(path: Path, text: str) -> None:
    """Write a page so that it is complete or absent; raises OutputError, also for a stranger's file."""
    _save(path, text, PAGE)


def save_json(path: Path, text: str) -> None:
    """Write JSON of a command so that it is complete or absent; OutputError, also for a stranger's file."""
    _save(path, text, JSON)


def is_page(path: Path) -> bool:
    """Whether a file is a page that `report_page` made."""
    try:
        return GENERATOR.encode() in read_head(path, 1000)
    except OSError:
        return False


def is_json(path: Path) -> bool:
    """Whether a file is JSON that a command wrote: all of it, or its first line, is an object of ours."""
    try:
        text = read_text(path, JSON_LIMIT)
        for part in (text.partition("\n")[0], text):
            if _is_ours(part, path):
                return True
    except ConversionError:
        pass
    return False


def _is_ours(text: str, path: Path) -> bool:
    try:
        value = parse_json(text, path)
    except ConversionError:
        return False
    return isinstance(value, dict) and any(keys <= value.keys() for keys in JSON_KEYS)


@dataclass(frozen=True)
class Kind:
    """A kind of file that a proof is written to: its name in messages, and how it is known."""

    name: str
    known: Callable[[Path], bool]


PAGE, JSON = Kind("a report of dsconvert", is_page), Kind("JSON of dsconvert", is_json)


def _save(path: Path, text: str, kind: Kind) -> None:
    check_side_file(path, ours=kind.known, kind=kind.name)
    write_file(path, text.encode("utf-8", "replace"), replace=True)
