"""What is proven of a GGUF file after it is written, from the file alone against the checkpoint."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters.gguf import mmproj_check
from converters.gguf.job import Job, Output
from converters.gguf.parse import GGUFFile, StoredTensor, open_gguf
from converters.gguf.reader import GGUFModel, open_model
from converters.gguf.towers import Towers
from dsconvert import text, thresholds, verify, windows
from dsconvert.arch import Sizes, Spec
from dsconvert.events import Check, Event, Step
from dsconvert.inner import language_model
from tokenizer_tools import parity
from tokenizer_tools.library import ids as encode
from tokenizer_tools.rebuild import rebuild

# Weights above which the logits are compared only when asked (`--verify full`): a forward pass of a bigger
# model takes longer on a CPU than its conversion.
QUICK_PARAMETERS = 50_000_000
PAGE = 8_000  # characters of held-out text whose logits are compared
WINDOW = 256  # tokens
SAMPLED = (8, 4)  # rows in a row, places: how much of every tensor is compared with its source


def prove(job: Job) -> Iterator[Event]:
    """Read every output back and compare it with the checkpoint; one Check for each thing compared.

    `--verify off` checks nothing and says so. "quick" compares structure, token ids, chat template and
    sampled weights, and the logits of models that are small enough; "full" always the logits.
    """
    if job.options.verify == "off":
        yield Step("verification is off: the files were not read back")
        return
    for output in job.outputs:
        yield from _prove_output(job, output, output.paths[0])
    if job.towers is not None and job.projector is not None:
        for check in _prove_projector(job, job.towers, job.projector):
            yield replace(check, name="mmproj " + check.name) if isinstance(check, Check) else check


def _prove_output(job: Job, output: Output, path: Path) -> Iterator[Event]:
    file = open_gguf(path)
    yield check_structure(job, output, file)
    yield _check_tokens(job, file)
    yield _check_template(job, file)
    model = open_model(file)
    yield from check_weights(job, output, file, [(spec, job.config) for spec in job.specs])
    parameters = sum(map(prod, model.shapes().values()))
    if job.options.verify == "full" or parameters <= QUICK_PARAMETERS:
        yield from _check_logits(job, output, model)
    else:
        yield Step(
            f"logits were not compared ({parameters / 1e9:.1f} billion weights); --verify full does it"
        )


def _prove_projector(job: Job, towers: Towers, output: Output) -> Iterator[Event]:
    """The projector as read back: complete for a runtime, paired, its weights the source's."""
    file = open_gguf(output.paths[0])
    yield check_structure(job, output, file)
    yield from mmproj_check.completeness(file)
    yield from check_weights(job, output, file, [(spec, towers.vision) for spec in towers.specs])
    faults = mmproj_check.pair_faults(open_gguf(job.outputs[0].paths[0]), file)
    yield Check("pair", not faults, "; ".join(faults) or "belongs to the text file")


def check_structure(job: Job, output: Output, file: GGUFFile) -> Check:
    """Names, shapes and types of the file as read back are the planned ones, and its numbers the config's."""
    planned = {(t.name, t.shape, t.qtype.name) for t in output.tensors.values()}
    stored = {(t.name, t.shape, t.qtype.name) for t in file.tensors.values()}
    good = planned == stored
    return Check("structure", good, f"{len(stored)} tensors, {len(file.typed)} keys", len(planned ^ stored))


def _check_tokens(job: Job, file: GGUFFile) -> Check:
    """The tokenizer rebuilt from the file alone gives the checkpoint's ids."""
    pages = [*parity.PROBES, text.evaluation_page(PAGE)]
    own, rebuilt = encode(job.tokenizer.tokenizer, pages), encode(rebuild(file.keys, file.path), pages)
    wrong = [page for page, a, b in zip(pages, own, rebuilt, strict=True) if a != b]
    count = sum(len(page) for page in pages)
    detail = f"same ids on {len(pages)} texts ({count:,} characters)"
    if wrong:
        detail = f"ids differ on {len(wrong)} of {len(pages)} texts, first on {wrong[0][:40]!r}"
    return Check("token ids", not wrong, detail, len(wrong))


def _check_template(job: Job, file: GGUFFile) -> Check:
    stored = file.keys.get("tokenizer.chat_template")
    detail = "none in the checkpoint" if job.tokenizer.chat_template is None else "carried unchanged"
    if job.towers is not None:
        detail = "the model's format, for strings and pictures"
    same = stored == job.tokenizer.chat_template
    return Check("chat template", same, detail if same else "differs from the checkpoint's")


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


def _check_logits(job: Job, output: Output, model: GGUFModel) -> Generator[Event, None, None]:
    """KL divergence of the file's logits from the checkpoint's own over a page of held-out text."""
    (ids,) = encode(job.tokenizer.tokenizer, [text.evaluation_page(PAGE)])
    length = min(WINDOW, job.config.context_length, len(ids))
    chosen = windows.consecutive(np.array(ids, np.int64), length, job.tokenizer.first_id)
    source, config = language_model(job.checkpoint, job.config)
    comparison = yield from verify.compare(
        source, model, config, windows.whole(chosen.tokens), candidate_config=model.config
    )
    verdict = verify.judge(comparison, thresholds.thresholds_for(output.quant))
    yield from verdict.checks
    figures = comparison.figures
    if figures is not None:
        yield Step(
            f"perplexity {figures.ppl.value:.3f}, of the checkpoint {figures.ppl_base.value:.3f}, "
            f"over {figures.tokens} predictions"
        )
