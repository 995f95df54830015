"""The figures of a proof as rows of a table, for the console and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from dsconvert.proof.figures import Figures
from dsconvert.proof.thresholds import Thresholds

if TYPE_CHECKING:
    from dsconvert.proof.runtime import EngineFigures


def _most(limit: float) -> str:
    return f"at most {limit:g}" if math.isfinite(limit) else ""


def figure_rows(figures: Figures, limits: Thresholds) -> list[tuple[str, str, str, str]]:
    """Name, value, standard error and limit of each figure, under llama.cpp's names."""
    k = figures.kld_percentiles
    rows = [
        ("Mean PPL(Q)", f"{figures.ppl.value:.4f}", f"{figures.ppl.error:.4f}", ""),
        ("Mean PPL(base)", f"{figures.ppl_base.value:.4f}", f"{figures.ppl_base.error:.4f}", ""),
        ("Mean PPL(Q)/PPL(base)", f"{figures.ppl_ratio.value:.5f}", f"{figures.ppl_ratio.error:.5f}",
         _most(limits.max_ppl_ratio)),
        ("Mean KLD", f"{figures.kld.value:.6f}", f"{figures.kld.error:.6f}", _most(limits.max_kld)),
        ("Median KLD", f"{figures.kld_median:.6f}", "", ""),
        *((f"{name} % KLD", f"{value:.6f}", "", "") for name, value in k.items()),
        ("Maximum KLD", f"{figures.kld_max:.6f}", "", ""),
        ("Mean Δp", f"{figures.p_diff.value:.3%}", f"{figures.p_diff.error:.3%}", ""),
        ("RMS Δp", f"{figures.p_diff_rms.value:.3%}", f"{figures.p_diff_rms.error:.3%}", ""),
        ("Same top p", f"{figures.same_top.value:.3%}", f"{figures.same_top.error:.3%}",
         "" if limits.min_top1 is None else f"at least {limits.min_top1:.0%}"),
        ("Top 5 overlap", f"{figures.top5_overlap:.3%}", "", ""),
    ]  # fmt: skip
    if figures.bits_per_byte is not None and figures.bits_per_byte_base is not None:
        rows.append(("Bits per byte (Q)", f"{figures.bits_per_byte:.4f}", "", ""))
        rows.append(("Bits per byte (base)", f"{figures.bits_per_byte_base:.4f}", "", ""))
    return rows


ENGINE_COLUMNS = ("run", "PPL", "PPL ratio", "mean KLD", "99 % KLD", "same top p")


def engine_rows(own: Figures, engine: EngineFigures) -> list[tuple[str, ...]]:
    """The cells of ENGINE_COLUMNS: the file's weights, what is predicted of the runtime, the runtime."""
    runs = {
        "weights in float32": own,
        f"predicted for {engine.name}": engine.predicted,
        engine.name: engine.figures,
    }
    return [
        (
            name,
            f"{run.ppl.value:.4f}",
            f"{run.ppl_ratio.value:.5f}",
            f"{run.kld.value:.6f}",
            f"{run.kld_percentiles['99']:.5f}",
            f"{run.same_top.value:.3%}",
        )
        for name, run in runs.items()
    ]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain texts."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"
