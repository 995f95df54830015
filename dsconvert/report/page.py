"""Makes the HTML page of a proof.

One HTML file that loads nothing: styles and charts are inside, and its own policy forbids scripts and
outside content.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape

from dsconvert.proof.figures import TensorError
from dsconvert.proof.result import GENERATOR, OUTCOME_COLUMNS, Outcome, Report, outcome_row, worst_tokens
from dsconvert.proof.thresholds import snr_floor
from dsconvert.report import charts, maps, scatter
from dsconvert.report.rows import ENGINE_COLUMNS, engine_rows, figure_rows, table
from dsconvert.report.style import STYLE

EXPERT = re.compile(r"(?<=experts)\.\d+")
# The order of a layer's parts; what is none of these comes last.
PARTS = (
    "input_layernorm", "q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj",
    "post_attention_layernorm", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
LAYERED = re.compile(r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(.+)")


def as_html(report: Report) -> str:
    """The whole page."""
    sections = (
        _head(report),
        _checks(report),
        _figures(report),
        _engine(report),
        *_charts(report),
        _worst(report),
        _sizes(report),
    )
    return document(report.title, "".join((*sections, _provenance(report))))


def comparison_page(title: str, outcomes: Sequence[Outcome]) -> str:
    """Several outputs of one model in one table, and their size against their KL divergence."""
    names = scatter.short_names([outcome.name for outcome in outcomes])
    points = [
        scatter.Point(name, o.nbytes / 1e6, o.figures.kld.value, o.passed)
        for name, o in zip(names, outcomes, strict=True)
        if o.figures is not None
    ]
    chart = ""
    if points:
        chart = scatter.log_scatter(points, "size, MB", "mean KLD, nats")
        chart += "<p>Left and low is better. The line joins the outputs that no other beats in both.</p>"
    body = f"<h1>{escape(title)}</h1>{chart}{table(OUTCOME_COLUMNS, map(outcome_row, outcomes))}"
    return document(title, body)


def document(title: str, body: str) -> str:
    """A whole page that may load nothing."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'{GENERATOR}<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )


def _head(report: Report) -> str:
    passed = report.verdict.passed
    badge = '<span class="pass">PASS</span>' if passed else '<span class="fail">FAIL</span>'
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in report.verdict.reasons)
    return f"<h1>{badge} {escape(report.title)}</h1>" + (f"<ul class='why'>{reasons}</ul>" if reasons else "")


def _checks(report: Report) -> str:
    rows = [("ok" if c.passed else "FAIL", c.name, c.detail) for c in report.verdict.checks]
    return f"<h2>Checks</h2><div class='checks'>{table(('', 'check', 'found'), rows)}</div>"


def _figures(report: Report) -> str:
    figures, limits = report.comparison.figures, report.limits
    if figures is None:
        reason = report.comparison.broken or "only a sample of blocks ran, so there are no logits to compare"
        return f"<h2>Figures</h2><p>None: {escape(reason)}.</p>"
    shown = table(("figure", "value", "± standard error", "limit"), figure_rows(figures, limits))
    note = f"Over {figures.tokens} predictions; base is the reference, Q the candidate. KL in nats."
    return f"<h2>Figures</h2>{shown}<p>{note}</p>"


def _engine(report: Report) -> str:
    engine, own = report.engine, report.comparison.figures
    if engine is None or own is None:
        return ""
    ratio, apart = engine.parity.ppl_ratio, engine.parity.kld.value
    note = (
        f"Predicted: the file's weights with activations rounded as {engine.name} rounds them. The runtime's "
        f"perplexity is {ratio.value - 1:+.2%} ± {ratio.error:.2%} from the prediction, its mean KLD from it "
        f"{apart:.3g}; the rounding alone makes {engine.rounding.kld.value:.3g}."
    )
    return f"<h2>Runtime</h2>{table(ENGINE_COLUMNS, engine_rows(own, engine))}<p>{note}</p>"


def _charts(report: Report) -> Iterable[str]:
    found = report.comparison
    whole = [block.relative for block in found.blocks if block.update is None]
    if whole:
        chart = charts.line(whole, "block", "relative L2 error")
        yield f"<h2>Error by layer</h2>{chart}<p>Of the hidden states after each block, mean over tokens.</p>"
    sampled = [block for block in found.blocks if block.update is not None]
    if sampled:
        rows = [(str(b.index), f"{b.update:.4g}", f"{report.limits.max_update:g}") for b in sampled]
        yield "<h2>Sampled blocks</h2>" + table(("block", "error of what it adds", "limit"), rows)
    yield _tensors(found.tensors)
    if found.tokens is not None and found.figures is not None:
        mean, high = found.figures.kld.value, found.figures.kld_percentiles["99"]
        marks = {f"mean {mean:.3g}": mean, f"99 % below {high:.3g}": high}
        chart = charts.log_histogram(found.tokens.kld, "KL divergence of a prediction, nats", marks)
        yield f"<h2>KL divergence</h2>{chart}"


def _tensors(tensors: tuple[TensorError, ...]) -> str:
    if not tensors:
        return ""
    rows: dict[str, dict[int, list[TensorError]]] = {}
    others = []
    for tensor in tensors:
        match = LAYERED.fullmatch(tensor.name)
        if match:
            name = EXPERT.sub(".*", match[2].removesuffix(".weight"))
            rows.setdefault(name, {}).setdefault(int(match[1]), []).append(tensor)
        else:
            others.append(tensor)
    finite = [t.snr for t in tensors if math.isfinite(t.snr)]
    weakest = sorted(tensors, key=_weakness)[:8]
    listed = [*others, *(t for t in weakest if t not in others)]
    cells = [(t.name, t.type, _decibel(t.snr), f"{snr_floor(t.type):g} dB") for t in listed]
    shown = table(("tensor", "type", "signal to noise", "floor"), cells)
    span = f"{min(finite):.1f} to {max(finite):.1f} dB" if finite else "no error in any tensor"
    note = (
        f"Signal to noise of the weights: {span}. The colours go from the least error here to the most, half "
        "by value and half by rank; empty: none at all. The table has what is in no layer, and the weakest."
    )
    return f"<h2>Error by tensor</h2>{_maps(rows)}<p>{note}</p>{shown}"


def _maps(rows: dict[str, dict[int, list[TensorError]]]) -> str:
    """The errors and the types of what the layers hold; of a layer's experts the worst, and every type."""
    if not rows:
        return ""
    layers = max(max(row) for row in rows.values()) + 1
    places = {name: i for i, name in enumerate(PARTS)}
    rows = dict(sorted(rows.items(), key=lambda item: places.get(item[0], len(places))))
    worst = {
        name: {layer: min(found, key=_weakness).snr for layer, found in row.items()}
        for name, row in rows.items()
    }
    types = {
        name: {layer: " and ".join(sorted({t.type for t in found})) for layer, found in row.items()}
        for name, row in rows.items()
    }
    return maps.error_map(worst, layers, "dB") + maps.type_map(types, layers)


def _weakness(tensor: TensorError) -> tuple[bool, float]:
    """Orders tensors: those that are not finite first, then by their error."""
    return not math.isnan(tensor.snr), tensor.snr


def _decibel(value: float) -> str:
    return "no error" if value == math.inf else "not finite" if math.isnan(value) else f"{value:.1f} dB"


def _worst(report: Report) -> str:
    words = worst_tokens(report)
    if not words:
        return ""
    rows = "".join(
        f"<tr><td>{w.kld:.3f}</td><td>{w.p_base:.2%}</td><td>{w.p:.2%}</td>"
        f"<td class='text'>{_shown(w.context)}<mark>{_shown(w.target)}</mark></td>"
        f"<td class='text'>{_shown(w.top_base, '·')}</td><td class='text'>{_shown(w.top, '·')}</td></tr>"
        for w in words
    )
    names = ("KLD", "p(base)", "p(Q)", "text and the token that follows", "base expects", "Q expects")
    heads = "".join(f"<th>{name}</th>" for name in names)
    return f"<h2>Worst tokens</h2><table><tr>{heads}</tr>{rows}</table>"


def _shown(text: str, space: str = " ") -> str:
    """Escaped, with white space and control characters made visible; `space` stands for a space."""
    text = text.replace(" ", space)
    shown = "".join("⏎" if c == "\n" else "⇥" if c == "\t" else c if c.isprintable() else "�" for c in text)
    return escape(shown)


def _sizes(report: Report) -> str:
    if not report.sizes:
        return ""
    bar = charts.stacked_bar({size.type: size.nbytes for size in report.sizes})
    rows = [
        (s.type, str(s.tensors), f"{s.weights:,}", f"{s.nbytes:,}", f"{8 * s.nbytes / max(s.weights, 1):.3f}")
        for s in report.sizes
    ]
    shown = table(("type", "tensors", "weights", "bytes", "bits per weight"), rows)
    return f"<h2>Size by type</h2>{bar}{shown}"


def _provenance(report: Report) -> str:
    rows = list(report.provenance.items())
    return f"<h2>Provenance</h2>{table(('what', 'value'), rows)}" if rows else ""
