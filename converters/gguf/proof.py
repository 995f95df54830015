"""What is proven of a GGUF file after it is written, from the file alone against the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from math import prod
from pathlib import Path

import numpy as np

from converters.gguf.as_model import GGUFModel, open_model
from converters.gguf.output import Output
from converters.gguf.parse import GGUFFile, open_gguf
from converters.gguf.plan import Job
from converters.gguf.projector import proof as projector_proof
from converters.gguf.sampled_weights import check_weights
from dsconvert.events import Check, Event, Step
from dsconvert.machine import collector_paused, free_memory
from dsconvert.models.language_model import language_model
from dsconvert.proof import compare, numpy_compare, thresholds, time_budget
from dsconvert.texts import builtin, windows
from dsconvert.vision.plan import Towers
from tokenizer_tools import identity, parity
from tokenizer_tools.library import ids as encode

QUICK_PARAMETERS = 50_000_000  # of towers whose embeddings a quick check compares
QUICK_SHARE = 1 / 5  # of the conversion's time, for a quick check; one block is run in any case
BLOCK_BYTES = 12  # of memory per weight of a block: two models in float32, and a tensor being read
PAGE = 8_000  # characters of held-out text whose logits are compared
WINDOW = 128  # tokens; short, so that one fits where time is scarce


def prove(job: Job, seconds: float = 0.0) -> Iterator[Event]:
    """Read every output back and compare it with the checkpoint; one Check for each thing compared.

    `--effort off` checks nothing and says so. Else structure, token ids, chat template and sampled rows of
    every tensor are compared; then "full" runs both models over a page of text, and "quick" as much of that
    as fits into a fifth of the `seconds` that the conversion took: all of a small model, at least one block
    of a big one, in numpy, since importing torch alone takes longer. What was chosen is said.
    """
    if job.options.effort == "off":
        yield Step("verification is off: the files were not read back")
        return
    budget = QUICK_SHARE * seconds / len(job.outputs)
    for output in job.outputs:
        yield from _prove_output(job, output, output.paths[0], budget)
    if job.towers is not None and job.projector is not None:
        yield from projector_proof.of_projector(_prove_projector(job, job.towers, job.projector))


def _prove_output(job: Job, output: Output, path: Path, seconds: float) -> Iterator[Event]:
    started = time.monotonic()
    with collector_paused():  # a vocabulary is a great many small objects, and no garbage
        file = open_gguf(path)
        told = [check_structure(job, output, file), *check_text(job, file)]
    yield from told
    model = open_model(file)
    yield from check_weights(job.checkpoint, file, job.specs, job.config.head_dim)
    yield from _check_logits(job, output, model, seconds - (time.monotonic() - started))


def _prove_projector(job: Job, towers: Towers, output: Output) -> Iterator[Event]:
    """The projector as read back: as planned, and proven with every text file that was made beside it."""
    file = open_gguf(output.paths[0])
    yield check_structure(job, output, file)
    model = projector_proof.Pictured(job.checkpoint, job.config, job.tokenizer, towers)
    parameters = sum(prod(spec.shape) for spec in towers.specs)
    compute = job.options.effort == "full" or parameters <= QUICK_PARAMETERS
    projector = job.options.mmproj_quant
    texts = [
        (open_gguf(text.paths[0]), projector_proof.limit_of(text.quant, projector)) for text in job.outputs
    ]
    yield from projector_proof.prove_pair(model, file, texts, compute=compute)
    if not compute:
        yield Step("image embeddings were not compared; --effort full does it")


def use_threads(count: int) -> None:
    """Let torch compute on so many threads, where a number was asked for."""
    import torch

    if count:
        torch.set_num_threads(count)


def check_structure(job: Job, output: Output, file: GGUFFile) -> Check:
    """Names, shapes and types of the file as read back are the planned ones, and its numbers the config's."""
    planned = {(t.name, t.shape, t.qtype.name) for t in output.tensors.values()}
    stored = {(t.name, t.shape, t.qtype.name) for t in file.tensors.values()}
    good = planned == stored
    return Check("structure", good, f"{len(stored)} tensors, {len(file.typed)} keys", len(planned ^ stored))


def check_text(job: Job, file: GGUFFile) -> Iterator[Check]:
    """Token ids, special tokens and chat template of the file alone are the checkpoint's."""
    pages = [*parity.PROBES, builtin.evaluation_page(PAGE)]
    own = identity.of_data(job.tokenizer)
    for found in identity.findings(own, identity.of_metadata(file.keys, file.path), pages):
        detail = found.detail
        if found.same and found.name == "chat template" and job.towers is not None:
            detail = "the model's format, for strings and pictures"
        yield Check(found.name, found.same, detail, found.count)


def _check_logits(job: Job, output: Output, model: GGUFModel, seconds: float) -> Generator[Event, None, None]:
    """The file's blocks and logits against the checkpoint's on a page of held-out text, as far as chosen."""
    (ids,) = encode(job.tokenizer.tokenizer, [builtin.evaluation_page(PAGE)])
    length = min(WINDOW, job.config.context_length, len(ids))
    page = windows.consecutive(np.array(ids, np.int64), length, job.tokenizer.first_id)
    source, config = language_model(job.checkpoint, job.config)
    full, needed = job.options.effort == "full", BLOCK_BYTES * time_budget.block_weights(config)
    free = free_memory()
    if not full and needed > free / 2:
        short = f"two decoder blocks need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        yield Step(f"no blocks were run and no logits compared: {short}; --effort full does it all the same")
        compare.check_sizes(config, model.config)
        yield from compare.judge_config(compare.config_differences(config, model.config))
        return
    limits, score = thresholds.thresholds_for(output.quant), windows.whole(page.tokens)
    if full:
        device = job.options.device
        use_threads(job.options.threads)
        chosen = time_budget.choose(config, score, "full", device)
        comparison, _ = yield from time_budget.check(
            source, model, config, chosen, limits, candidate_config=model.config, device=device
        )
    else:
        comparison = yield from numpy_compare.check(
            source, model, config, score, limits, seconds, model.config, job.options.threads
        )
    figures = comparison.figures
    if figures is not None:
        yield Step(
            f"perplexity {figures.ppl.value:.3f}, of the checkpoint {figures.ppl_base.value:.3f}, "
            f"over {figures.tokens} predictions"
        )
