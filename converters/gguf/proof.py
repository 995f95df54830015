"""What is proven of a GGUF file after it is written, from the file alone against the checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf import image_proof, mmproj_check
from converters.gguf.job import Job, Output
from converters.gguf.parse import GGUFFile, StoredTensor, open_gguf
from converters.gguf.reader import GGUFModel, open_model
from converters.gguf.towers import Towers
from dsconvert import effort, quick, text, thresholds, windows
from dsconvert.arch import Sizes, Spec
from dsconvert.events import Check, Event, Step
from dsconvert.inner import language_model
from tokenizer_tools import identity, parity
from tokenizer_tools.library import ids as encode

QUICK_PARAMETERS = 50_000_000  # of towers whose embeddings a quick check compares
QUICK_SHARE = 1 / 3  # of the conversion's time, for a quick check
QUICK_SECONDS = 2.0  # and at least so many: two blocks are always run
BLOCK_BYTES = 12  # of memory per weight of a block: two models in float32, and a tensor being read
PAGE = 8_000  # characters of held-out text whose logits are compared
WINDOW = 128  # tokens; short, so that one fits where time is scarce
SAMPLED = (8, 4)  # rows in a row, places: how much of every tensor is compared with its source


def prove(job: Job, seconds: float = 0.0) -> Iterator[Event]:
    """Read every output back and compare it with the checkpoint; one Check for each thing compared.

    `--verify off` checks nothing and says so. Else structure, token ids, chat template and sampled rows of
    every tensor are compared; then "full" runs both models over a page of text, and "quick" as much of that
    as fits into a third of the `seconds` that the conversion took: all of a small model, some blocks of a
    big one, in numpy, since importing torch alone takes longer. What was chosen is said.
    """
    if job.options.verify == "off":
        yield Step("verification is off: the files were not read back")
        return
    budget = max(QUICK_SECONDS, QUICK_SHARE * seconds) / len(job.outputs)
    for output in job.outputs:
        yield from _prove_output(job, output, output.paths[0], budget)
    if job.towers is not None and job.projector is not None:
        for check in _prove_projector(job, job.towers, job.projector):
            yield replace(check, name="mmproj " + check.name) if isinstance(check, Check) else check


def _prove_output(job: Job, output: Output, path: Path, seconds: float) -> Iterator[Event]:
    started = time.monotonic()
    file = open_gguf(path)
    yield check_structure(job, output, file)
    yield from check_text(job, file)
    model = open_model(file)
    yield from check_weights(job, output, file, [(spec, job.config) for spec in job.specs])
    yield from _check_logits(job, output, model, seconds - (time.monotonic() - started))


def _prove_projector(job: Job, towers: Towers, output: Output) -> Iterator[Event]:
    """The projector as read back: complete for a runtime, paired, its weights the source's."""
    file = open_gguf(output.paths[0])
    yield check_structure(job, output, file)
    yield from mmproj_check.completeness(file)
    yield from check_weights(job, output, file, [(spec, towers.vision) for spec in towers.specs])
    faults = mmproj_check.pair_faults(open_gguf(job.outputs[0].paths[0]), file)
    yield Check("pair", not faults, "; ".join(faults) or "belongs to the text file")
    parameters = sum(prod(spec.shape) for spec in towers.specs)
    if job.options.verify == "full" or parameters <= QUICK_PARAMETERS:
        both = image_proof.embeddings(job.checkpoint, towers, file)
        yield image_proof.check_embeddings(*both, job.options.mmproj_quant)
        for text_output in job.outputs:
            limit = image_proof.limit_of(text_output.quant, job.options.mmproj_quant)
            written = open_gguf(text_output.paths[0])
            yield image_proof.check_question(
                job.checkpoint, job.config, job.tokenizer, towers, written, limit, both
            )
    else:
        yield Step("image embeddings were not compared; --verify full does it")


def check_structure(job: Job, output: Output, file: GGUFFile) -> Check:
    """Names, shapes and types of the file as read back are the planned ones, and its numbers the config's."""
    planned = {(t.name, t.shape, t.qtype.name) for t in output.tensors.values()}
    stored = {(t.name, t.shape, t.qtype.name) for t in file.tensors.values()}
    good = planned == stored
    return Check("structure", good, f"{len(stored)} tensors, {len(file.typed)} keys", len(planned ^ stored))


def check_text(job: Job, file: GGUFFile) -> Iterator[Check]:
    """Token ids, special tokens and chat template of the file alone are the checkpoint's."""
    pages = [*parity.PROBES, text.evaluation_page(PAGE)]
    own = identity.of_data(job.tokenizer)
    for found in identity.findings(own, identity.of_metadata(file.keys, file.path), pages):
        detail = found.detail
        if found.same and found.name == "chat template" and job.towers is not None:
            detail = "the model's format, for strings and pictures"
        yield Check(found.name, found.same, detail, found.count)


def check_weights(
    job: Job, output: Output, file: GGUFFile, specs: Sequence[tuple[Spec, Sizes]]
) -> Iterator[Check]:
    """Sampled rows of every tensor, dequantized, against the source: the signal to noise of each type."""
    worst: tuple[float, str, str] | None = None
    for spec, config in specs:
        kind = output.tensors[spec.gguf].qtype.name
        snr = _sampled_snr(spec.forward(job.checkpoint.raw(spec.hf), config), file.tensors[spec.gguf])
        floor = thresholds.snr_floor(kind)
        if not snr >= floor:
            detail = f"{spec.gguf}: signal to noise {snr:.1f} dB, {kind} should reach {floor:g} dB"
            yield Check("weights", False, detail, snr)
            return
        if worst is None or snr - floor < worst[0]:
            worst = (snr - floor, spec.gguf, f"{snr:.1f} dB ({kind})")
    if worst:
        detail = f"{len(specs)} tensors sampled; nearest to its floor {worst[1]}, {worst[2]}"
        yield Check("weights", True, detail, worst[0])


def _sampled_snr(view: npt.NDArray[Any], stored: StoredTensor) -> float:
    """Signal to noise in dB of sampled rows against the source's view; infinite when they are equal."""
    if view.ndim == 1:
        view = view.reshape(1, -1)
    rows = prod(view.shape[:-1])
    length, places = SAMPLED
    starts = {int(at) for at in np.linspace(0, max(rows - length, 0), places)}
    noise = signal = 0.0
    for start in starts:
        index = np.unravel_index(np.arange(start, min(start + length, rows)), view.shape[:-1])
        exact = _widened(view[index])
        error = stored.float32_rows(start, start + len(exact)).reshape(exact.shape) - exact
        noise += float(np.sum(np.square(error, dtype=np.float64)))
        signal += float(np.sum(np.square(exact, dtype=np.float64)))
    if noise == 0.0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal else float("-inf")


def _widened(raw: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    if raw.dtype == np.uint16:
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def _check_logits(job: Job, output: Output, model: GGUFModel, seconds: float) -> Generator[Event, None, None]:
    """The file's blocks and logits against the checkpoint's on a page of held-out text, as far as chosen."""
    (ids,) = encode(job.tokenizer.tokenizer, [text.evaluation_page(PAGE)])
    length = min(WINDOW, job.config.context_length, len(ids))
    page = windows.consecutive(np.array(ids, np.int64), length, job.tokenizer.first_id)
    source, config = language_model(job.checkpoint, job.config)
    full, needed = job.options.verify == "full", BLOCK_BYTES * effort.block_weights(config)
    free = free_memory()
    if not full and needed > free / 2:
        short = f"two decoder blocks need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        yield Step(f"no blocks were run and no logits compared: {short}; --verify full does it all the same")
        return
    limits, score = thresholds.thresholds_for(output.quant), windows.whole(page.tokens)
    if full:
        chosen = effort.choose(config, score, "full", "auto")
        comparison, _ = yield from effort.check(
            source, model, config, chosen, limits, candidate_config=model.config
        )
    else:
        comparison = yield from quick.check(source, model, config, score, limits, seconds, model.config)
    figures = comparison.figures
    if figures is not None:
        yield Step(
            f"perplexity {figures.ppl.value:.3f}, of the checkpoint {figures.ppl_base.value:.3f}, "
            f"over {figures.tokens} predictions"
        )


def free_memory() -> float:
    """Bytes that can be taken without swapping; half of all memory where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
