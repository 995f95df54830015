"""What is proven of a quantized folder after it is written, whatever its format, against its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from dsconvert.checkpoints.source_files import companions
from dsconvert.events import Check, Event, Step
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource
from dsconvert.proof import thresholds, time_budget
from dsconvert.texts import builtin
from dsconvert.texts.encode_long import Encode
from dsconvert.texts.windows import Windows, consecutive, whole

PAGE = 16_000  # characters of held-out text whose logits are compared
WINDOW = 256  # tokens


def held_out(encode: Encode, config: ModelConfig, bos: int | None) -> Windows:
    """The windows of held-out text that a result is judged on."""
    (ids,) = encode([builtin.evaluation_page(PAGE)])
    length = min(WINDOW, config.context_length, len(ids))
    return whole(consecutive(np.array(ids, np.int64), length, bos).tokens)


def check_companions(source: Path, out: Path, made: Collection[str] = ()) -> Check:
    """Tokenizer and generation files of the folder `out` are those of `source`, byte by byte.

    Those called as in `made` are no copies: they were made for another layout.
    """
    files = [file for file in companions(source) if file.name not in made]
    wrong = [f.name for f in files if (out / f.name).read_bytes() != f.read_bytes()]
    detail = f"differ: {', '.join(wrong)}" if wrong else f"{len(files)} files as in the checkpoint"
    return Check("tokenizer", not wrong, detail, len(wrong))


def check_logits(
    base: tuple[WeightSource, ModelConfig],
    candidate: tuple[WeightSource, ModelConfig],
    windows: Windows,
    mode: Literal["quick", "full"],
    limits: str,
    device: str,
) -> Iterator[Event]:
    """Compare weights, blocks and logits with the checkpoint's: a Check each, by `limits`' thresholds."""
    chosen = time_budget.choose(base[1], windows, mode, device)
    comparison, _ = yield from time_budget.check(
        base[0], candidate[0], base[1], chosen, thresholds.thresholds_for(limits),
        candidate_config=candidate[1], device=device,
    )  # fmt: skip
    figures = comparison.figures
    if figures is not None:
        yield Step(
            f"perplexity {figures.ppl.value:.3f}, of the checkpoint {figures.ppl_base.value:.3f}, "
            f"over {figures.tokens} predictions"
        )
