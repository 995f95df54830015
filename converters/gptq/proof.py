"""What is proven of a GPTQ folder after it is written, from the folder alone against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from converters.gptq.folder import companions
from converters.gptq.job import Job
from converters.gptq.reader import GPTQModel, open_model
from dsconvert import effort, text, thresholds
from dsconvert.config import load_config
from dsconvert.events import Check, Event, Step
from dsconvert.inner import language_model
from dsconvert.windows import Windows, consecutive, whole
from tokenizer_tools.library import ids as encode

PAGE = 16_000  # characters of held-out text whose logits are compared
WINDOW = 256  # tokens


def evaluation(job: Job) -> Windows:
    """The windows of held-out text that the result is judged on."""
    (ids,) = encode(job.tokenizer.tokenizer, [text.evaluation_page(PAGE)])
    length = min(WINDOW, job.config.context_length, len(ids))
    return whole(consecutive(np.array(ids, np.int64), length, job.tokenizer.first_id).tokens)


def prove(job: Job) -> Iterator[Event]:
    """Read the folder back and compare it with the checkpoint; one Check for each thing compared.

    `--verify off` checks nothing and says so. "quick" sizes the comparison of blocks and logits to some 20
    seconds, "full" runs all of it.
    """
    mode = job.options.verify
    if mode == "off":
        yield Step("verification is off: the folder was not read back")
        return
    model = open_model(job.out)
    yield check_structure(job, model)
    yield check_companions(job)
    config = load_config(job.out)
    source, inner = language_model(model, config)
    sized: Literal["quick", "full"] = "full" if mode == "full" else "quick"
    chosen = effort.choose(job.config, evaluation(job), sized, job.options.device)
    limits = thresholds.thresholds_for(f"gptq{job.options.bits}")
    comparison, _ = yield from effort.check(
        job.source, source, job.config, chosen, limits, candidate_config=inner, device=job.options.device
    )
    figures = comparison.figures
    if figures is not None:
        yield Step(
            f"perplexity {figures.ppl.value:.3f}, of the checkpoint {figures.ppl_base.value:.3f}, "
            f"over {figures.tokens} predictions"
        )


def check_structure(job: Job, model: GPTQModel) -> Check:
    """Names, shapes and types of the folder as read back are the planned ones."""
    planned = {(job.names[name], shape, f"gptq{job.options.bits}") for name, shape in job.linears.items()}
    stored = job.checkpoint.tensors
    planned |= {(out, stored[name].shape, stored[name].dtype) for out, name in job.kept.items()}
    found = {(name, shape, model.dtype(name)) for name, shape in model.shapes().items()}
    detail = f"{len(model.linears)} linears of {job.options.bits} bits, {len(job.kept)} tensors kept"
    return Check("structure", planned == found, detail, len(planned ^ found))


def check_companions(job: Job) -> Check:
    """Tokenizer and generation files are the checkpoint's, byte by byte."""
    files = companions(job.checkpoint.folder)
    wrong = [f.name for f in files if (job.out / f.name).read_bytes() != f.read_bytes()]
    detail = f"differ: {', '.join(wrong)}" if wrong else f"{len(files)} files as in the checkpoint"
    return Check("tokenizer", not wrong, detail, len(wrong))
