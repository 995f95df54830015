"""The same windows through llama.cpp: what it makes of a file, beside what its own arithmetic predicts.

Three runs of a file differ: its weights in float32; the prediction, the same weights with activations
rounded as the runtime rounds them (`activations`); and the runtime. From the first to the second is the
runtime's arithmetic; from the second to the third should be nothing but chance.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.experts import Observer
from dsconvert.events import Check, Event, Step
from dsconvert.proof.figures import (
    Estimate,
    Figures,
    TokenFigures,
    exponential,
    joined,
    log_figures,
    mean,
    summary,
)
from dsconvert.proof.runtime_rounding import rounded_inputs, rounding
from dsconvert.proof.runtime_rule import RuntimeRule, rule_for
from dsconvert.proof.scores import hidden_states, scored_states
from dsconvert.proof.thresholds import ENGINE_LIMITS, EngineLimits, Thresholds
from dsconvert.runtimes.llamacpp import Engine
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch

REFERENCE, WEIGHTS, PREDICTED, ENGINE = range(4)
PAIRS = {
    "figures": (REFERENCE, ENGINE),
    "predicted": (REFERENCE, PREDICTED),
    "rounding": (WEIGHTS, PREDICTED),
    "parity": (PREDICTED, ENGINE),
}


@dataclass(frozen=True)
class EngineFigures:
    """What a runtime made of a file: its figures, and the predicted ones, both against the reference.

    `rounding` are the figures of the prediction against the file's weights in float32, `parity` those of the
    runtime against the prediction; `ppl_to_weights` is the runtime's perplexity over that of the weights.
    """

    name: str
    figures: Figures
    predicted: Figures
    rounding: Figures
    parity: Figures
    ppl_to_weights: Estimate


def engine_figures(
    engine: Engine,
    pair: tuple[st.Decoder, st.Decoder],
    windows: Windows,
    states: tuple[torch.Tensor, torch.Tensor] | None = None,
    types: Mapping[str, str] | None = None,
) -> Generator[Event, None, EngineFigures]:
    """Run the prediction and the engine over the windows; `pair` are the reference and the file.

    `states` are the final ones of both, see compare.Comparison; where there are none both are run once more.
    `types` are those of the file's tensors, by its own names.
    Yields Steps. Holds both heads and one window's logits. Raises what decoders and engine raise.
    """
    file = pair[1]
    (norm, base_head), (file_norm, head) = (st.head_weights(decoder) for decoder in pair)
    if states is None:
        first = yield from hidden_states(pair[0], windows)
        second = yield from hidden_states(file, windows)
        states = scored_states(pair[0], norm, first, windows), scored_states(file, file_norm, second, windows)
    yield Step("running the file's weights with activations rounded as llama.cpp rounds them")
    hidden = yield from hidden_states(file, windows, partial(as_runtime, file, rule_for(file.config), types))
    predicted = rounding(file, file.head)(scored_states(file, file_norm, hidden, windows))
    runs = ((states[0], base_head), (states[1], head), (predicted, head))
    parts: dict[str, list[dict[str, object]]] = {name: [] for name in PAIRS}
    done = 0
    for window, start in enumerate(windows.first.tolist()):
        yield Step(f"llama.cpp: window {window + 1} of {len(windows.first)}")
        theirs = engine.logits(windows.tokens[window])[:, : file.config.vocab_size]
        for rows in st.chunks(start, windows.length - 1, file.config.vocab_size):
            at = slice(done, done + rows.stop - rows.start)
            done = at.stop
            logits = [x[at] @ matrix.T for x, matrix in runs]
            logits.append(_tensor(theirs[rows], head))
            logs = [x.double().log_softmax(-1) for x in logits]
            targets, places = _tensor(windows.targets(window, rows), head), windows.places(window, rows)
            for name, (a, b) in PAIRS.items():
                parts[name].append(log_figures(logs[a], logs[b], targets) | places)
    return _summaries({name: joined(part) for name, part in parts.items()})


def as_runtime(
    file: st.Decoder, rule: RuntimeRule | None, types: Mapping[str, str] | None, block: st.Block
) -> Mapping[str, Observer]:
    """Let a block choose experts by the runtime's `rule`; how it rounds what matrices are applied to."""
    if rule is not None:
        rule.install(block)
    return rounded_inputs(file, block, types)


def _summaries(tokens: dict[str, TokenFigures]) -> EngineFigures:
    ratio = exponential(mean(tokens["figures"].nll - tokens["rounding"].nll_base))
    return EngineFigures(
        "llama.cpp", ppl_to_weights=ratio, **{name: summary(part) for name, part in tokens.items()}
    )


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.as_tensor(array).to(like.device)


def judge_engine(
    engine: EngineFigures, limits: Thresholds, near: EngineLimits = ENGINE_LIMITS
) -> list[Check]:
    """The runtime's divergence from the reference, and how near it is to what was predicted of it."""
    found, parity, rounding = engine.figures, engine.parity, engine.rounding
    off, margin = parity.ppl_ratio.value - 1, near.ppl + 3 * parity.ppl_ratio.error
    limit, apart = limits.max_kld + rounding.kld.value, near.least + near.spread * rounding.kld.value
    return [
        Check(
            "engine PPL",
            abs(off) <= margin,
            f"llama.cpp's perplexity {found.ppl.value:.4f}, predicted {parity.ppl_base.value:.4f} "
            f"({off:+.2%} ± {parity.ppl_ratio.error:.2%}, limit {margin:.2%}); of the weights in float32 "
            f"{rounding.ppl_base.value:.4f} ({engine.ppl_to_weights.value - 1:+.2%})",
            found.ppl.value,
        ),
        Check(
            "engine KLD",
            found.kld.value <= limit,
            f"llama.cpp's mean KLD {found.kld.value:.3g}, predicted {engine.predicted.kld.value:.3g}, "
            f"limit {limit:.3g}",
            found.kld.value,
        ),
        Check(
            "engine parity",
            parity.kld.value <= apart,
            f"mean KLD of llama.cpp from its prediction {parity.kld.value:.3g}, limit {apart:.3g}; its "
            f"rounding alone makes {rounding.kld.value:.3g}",
            parity.kld.value,
        ),
    ]


def check_engine_text(
    engine: Engine, texts: Sequence[str], ids: Sequence[Sequence[int]], bos: int | None, template: str
) -> list[Check]:
    """The runtime's token ids on the texts, its BOS (an id, or None where none is added), its template."""
    own = [engine.tokenize(text, parse_special=True) for text in texts]
    wrong = [text for text, a, b in zip(texts, own, ids, strict=True) if a != list(b)]
    detail = f"same ids on {len(texts)} texts ({sum(map(len, texts)):,} characters)"
    if wrong:
        detail = f"llama.cpp's token ids differ on {len(wrong)} texts, for example {wrong[0][:40]!a}"
    special = engine.special
    found = special["bos"] if special["add_bos"] else None
    same = engine.chat_template() == (template or None)
    return [
        Check("engine ids", not wrong, detail, len(wrong)),
        Check("engine BOS", found == bos, f"llama.cpp adds BOS {found}, the checkpoint {bos}"),
        Check(
            "engine template", same, "as in the checkpoint" if same else "llama.cpp has another chat template"
        ),
    ]
