"""The same windows through llama.cpp: what it makes of a file, against the reference's own logits."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dsconvert import streaming as st
from dsconvert.arch import WeightSource
from dsconvert.config import ModelConfig
from dsconvert.engines.llamacpp import Engine
from dsconvert.events import Check, Event, Step
from dsconvert.figures import (
    Estimate,
    Figures,
    TokenFigures,
    exponential,
    joined,
    mean,
    summary,
    token_figures,
)
from dsconvert.scoring import scored_states
from dsconvert.thresholds import Thresholds
from dsconvert.windows import Windows

if TYPE_CHECKING:
    import torch

# llama.cpp rounds activations to 8 bits for quantized types and to bf16 for bf16: on SmolLM2-135M that alone
# gives a mean KLD of .003 and .3 % of perplexity. A wrong RoPE, tokenizer or key gives far more.
KLD_FLOOR = 0.01
PPL_MARGIN = 0.01


def engine_figures(
    engine: Engine,
    reference: WeightSource,
    config: ModelConfig,
    windows: Windows,
    *,
    states: torch.Tensor | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Generator[Event, None, TokenFigures]:
    """The engine's figures against the reference, window by window over the same tokens.

    `states` are the reference's final ones, see verify.Comparison; where there are none it is run once
    more. Yields Steps. Holds the reference's head and one window's logits. Raises what both raise.
    """
    place = st.pick_device(device)
    decoder = st.open_decoder(reference, config, place, st.pick_dtype(dtype, place))
    norm, head = st.head_weights(decoder)
    if states is None:
        hidden = st.embed(st.read(decoder, st.EMBED), windows.tokens, decoder.dtype)
        for index in range(config.layers):
            hidden = st.run_block(decoder, st.load_block(decoder, index), hidden)
        states = scored_states(decoder, norm, hidden, windows)
    parts, done = [], 0
    for window, first in enumerate(windows.first.tolist()):
        yield Step(f"llama.cpp: window {window + 1} of {len(windows.first)}")
        theirs = engine.logits(windows.tokens[window])
        for rows in st.chunks(first, windows.length - 1, config.vocab_size):
            count = rows.stop - rows.start
            own = (states[done : done + count] @ head.T).float()
            other = _tensor(theirs[rows, : config.vocab_size], own)
            targets = _tensor(windows.targets(window, rows), own)
            parts.append(token_figures(own, other, targets) | windows.places(window, rows))
            done += count
    return joined(parts)


def _tensor(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.as_tensor(array).to(like.device)


@dataclass(frozen=True)
class EngineFigures:
    """What the runtime made of a file: its figures against the reference, and against the file's weights.

    `ppl_to_weights` is its perplexity over that of the file's weights read here; the rest of its error is
    the runtime's arithmetic.
    """

    name: str
    figures: Figures
    ppl_to_weights: Estimate


def engine_summary(engine: TokenFigures, own: TokenFigures) -> EngineFigures:
    """The runtime's figures; `own` are the file's as read here, over the same predictions."""
    ratio = exponential(mean(engine.nll - own.nll))
    return EngineFigures("llama.cpp", summary(engine), ratio)


def judge_engine(engine: EngineFigures, own: Figures, limits: Thresholds) -> list[Check]:
    """The runtime's divergence from the reference, and its perplexity beside that of the file's weights."""
    found, weights, ratio = engine.figures, own, engine.ppl_to_weights
    margin = PPL_MARGIN + 3 * ratio.error
    limit = limits.max_kld + KLD_FLOOR
    return [
        Check(
            "engine PPL",
            abs(ratio.value - 1) <= margin,
            f"llama.cpp's perplexity {found.ppl.value:.4f}, of the file's weights {weights.ppl.value:.4f} "
            f"({ratio.value - 1:+.2%} ± {ratio.error:.2%}, limit {margin:.2%})",
            found.ppl.value,
        ),
        Check(
            "engine KLD",
            found.kld.value <= limit,
            f"llama.cpp's mean KLD {found.kld.value:.3g}, of the file's weights {weights.kld.value:.3g}, "
            f"limit {limit:g}",
            found.kld.value,
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
