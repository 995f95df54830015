"""The windows of held-out text that the benchmarks of quantized folders are judged on."""

from __future__ import annotations

import numpy as np

from dsconvert.models.config import ModelConfig
from dsconvert.quantization.plan import Job
from dsconvert.texts import builtin
from dsconvert.texts.encode_long import Encode
from dsconvert.texts.windows import Windows, consecutive, whole

PAGE, WINDOW = 16_000, 256  # characters; tokens


def held_out(encode: Encode, config: ModelConfig, bos: int | None) -> Windows:
    """All windows of the page, every prediction scored."""
    (ids,) = encode([builtin.evaluation_page(PAGE)])
    length = min(WINDOW, config.context_length, len(ids))
    return whole(consecutive(np.array(ids, np.int64), length, bos).tokens)


def evaluation(job: Job) -> Windows:
    """Those of a conversion's model."""
    return held_out(job.tokenizer.encode, job.model.config, job.tokenizer.first_id)
