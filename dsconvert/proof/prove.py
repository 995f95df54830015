"""The proof of one output against its checkpoint: text, weights, blocks, logits, the real runtime."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import dsconvert
from dsconvert.calibration.record import evaluation_windows
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import TokenizerError, UsageError
from dsconvert.events import Check, Event, Step, Warn
from dsconvert.machine import usable_cores
from dsconvert.proof import compare as comparing
from dsconvert.proof import logprob_file, time_budget
from dsconvert.proof.compare import Comparison
from dsconvert.proof.result import Report
from dsconvert.proof.sources import Opened, Reference, limits_name
from dsconvert.proof.thresholds import Thresholds, thresholds_for, verdict
from dsconvert.texts import builtin
from dsconvert.texts.sets import BUILTIN, load_text
from dsconvert.texts.windows import Windows, consecutive, strided
from tokenizer_tools import identity, parity
from tokenizer_tools.library import decode
from tokenizer_tools.library import ids as encode

if TYPE_CHECKING:
    from dsconvert.proof.runtime import EngineFigures

PAGE = 20_000  # characters of text on which tokenizers are compared, besides the probes
RUNTIME_LENGTH = 512  # tokens: the window of llama.cpp's perplexity tool


@dataclass(frozen=True)
class ProofOptions:
    """How an output is to be verified; `length` 0 stands for 2048, or llama.cpp's own window."""

    text: str = BUILTIN
    windows: int = 8
    length: int = 0
    stride: int = 512
    device: str = "auto"
    dtype: str | None = None
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    min_top1: float | None = None
    kld_base: Path | None = None
    engine: str | None = None
    effort: str = "full"


@dataclass(frozen=True)
class Text:
    """The windows that are scored, and the pages on which tokenizers are compared."""

    windows: Windows
    pages: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Companion:
    """What is proven beside an output, such as its projector: a line for the report, and what yields the
    checks.
    """

    said: str
    check: Callable[[], Generator[Event, None, list[Check]]]


@dataclass(frozen=True)
class Proof:
    """An output with its report."""

    opened: Opened
    report: Report


def prove(
    opened: Opened, reference: Reference, asked: ProofOptions, companion: Companion | None = None
) -> Generator[Event, None, Proof]:
    """Verify one output: yields steps and Checks, returns the report with the verdict over all of them.

    Raises ConversionError when something cannot be compared at all: a file that cannot be read, another
    model, text that is too short. What can be compared and is wrong is a failed Check.

    >>> from converters.outputs import open_output, open_reference
    >>> from dsconvert.checkpoints.locate import locate
    >>> reference, opened = open_reference("sample:"), open_output(locate("sample:"))
    >>> events = list(prove(opened, reference, ProofOptions(windows=1, length=64)))
    >>> all(event.passed for event in events if isinstance(event, Check))
    True
    """
    for note in (*reference.notes, *opened.notes):
        yield Warn(note)
    if opened.kind != "GGUF" and asked.engine:
        raise UsageError(
            "--engine llama.cpp runs GGUF files", where=opened.path, why=f"this is a {opened.kind}"
        )
    comparing.check_sizes(reference.config, opened.config)
    changes = {"max_kld": asked.max_kld, "max_ppl_ratio": asked.max_ppl_ratio, "min_top1": asked.min_top1}
    limits = thresholds_for(limits_name(opened), **changes)
    chosen_text = yield from choose_text(reference, asked)
    yield Step(f"{opened.path}: {opened.kind} {opened.quant}, {opened.bits:.2f} bits per weight")
    checks = check_text(opened, reference, chosen_text.pages)
    yield from checks
    dtype = asked.dtype or ("float32" if asked.engine else None)  # the runtime computes in float32
    where: dict[str, Any] = {"device": asked.device, "dtype": dtype}
    comparison = yield from compare_output(opened, reference, chosen_text, asked, where)
    found = list(comparing.judge(comparison, limits).checks)
    yield from found
    engine = None
    if asked.engine and comparison.tokens is not None:
        engine, others = yield from run_engine(opened, reference, chosen_text, limits, comparison, where)
        found += others
    if companion is not None:
        found += yield from companion.check()
    check_unchanged(reference.checkpoint.seen)  # else something else was compared
    said = verdict([*checks, *found])
    report = Report(
        title=f"{opened.path.name} against {reference.title}",
        comparison=comparison,
        verdict=said,
        limits=limits,
        windows=chosen_text.windows,
        sizes=opened.sizes,
        provenance=provenance(opened, reference, chosen_text, where, comparison)
        | ({} if companion is None else {"projector": companion.said}),
        engine=engine,
        decode=partial(decode, reference.tokenizer.tokenizer),
    )
    return Proof(opened, report)


def choose_text(reference: Reference, asked: ProofOptions) -> Generator[Event, None, Text]:
    """The windows to score, cut as asked from the text that is named; raises UsageError, CheckpointError."""
    tokenizer, bos = reference.tokenizer.tokenizer, reference.tokenizer.first_id
    runtime = asked.kld_base is not None or asked.engine is not None
    length = min(asked.length or (RUNTIME_LENGTH if runtime else 2048), reference.config.context_length)
    stride = min(asked.stride, length)
    if asked.kld_base is not None and os.path.lexists(asked.kld_base):
        base = logprob_file.open_base(asked.kld_base)
        return Text(base.windows, pages_of(builtin.evaluation_page(PAGE)), str(asked.kld_base))
    if asked.text == BUILTIN:
        count = length + (asked.windows - 1) * (length if asked.kld_base else stride)
        page = builtin_page(tokenizer, count)
        ids = np.array(encode(tokenizer, [page])[0][:count], np.int64)
        if asked.kld_base is not None:
            return Text(consecutive(ids, length, bos), pages_of(page), BUILTIN)
        return Text(strided(ids, length, stride, bos), pages_of(page), BUILTIN)
    found = yield from load_text(asked.text, "evaluation")
    if asked.kld_base is not None:
        stride = length
    windows = evaluation_windows(
        found, lambda texts: encode(tokenizer, texts), length=length, stride=stride, count=asked.windows,
        bos=bos,
    )  # fmt: skip
    if asked.kld_base is not None:
        windows = Windows(windows.tokens, np.full(len(windows.tokens), length // 2, np.int64))
    return Text(windows, pages_of(found.documents[0]), f"{found.name} {found.provenance}")


def builtin_page(tokenizer: Any, tokens: int) -> str:
    """A page of the built-in evaluation text (prose, code, some Chinese) of at least so many tokens."""
    chars = 4 * tokens
    while True:
        page = builtin.evaluation_page(chars)
        found = len(encode(tokenizer, [page])[0])
        if found >= tokens:
            return page
        chars = max(chars + 1000, chars * tokens // max(found, 1))


def pages_of(page: str) -> tuple[str, ...]:
    """The probes, and the beginning of a text in pieces that every runtime takes."""
    pieces = [page[at : at + 4000] for at in range(0, min(len(page), PAGE), 4000)]
    return (*parity.PROBES, *pieces)


def check_text(opened: Opened, reference: Reference, pages: Sequence[str]) -> list[Check]:
    """Tokenizer, special tokens and chat template, from the output's own files."""
    if isinstance(opened.text, TokenizerError):
        return [Check("token ids", False, str(opened.text))]
    own = handling(reference, opened)
    found = identity.findings(own, opened.text, pages)
    if opened.keys:
        found.append(identity.same_runtime(own, opened.keys, pages))
    return [Check(f.name, f.same, f.detail, f.count) for f in found]


def handling(reference: Reference, opened: Opened) -> identity.TextHandling:
    """How the checkpoint handles text; of the templates that an output may carry the one that it does."""
    own = identity.of_data(reference.tokenizer)
    template = "" if isinstance(opened.text, TokenizerError) else opened.text.template
    known = template if template in reference.templates else reference.templates[-1]
    return replace(own, template=known)


def run_engine(
    opened: Opened,
    reference: Reference,
    chosen_text: Text,
    limits: Thresholds,
    comparison: Comparison,
    where: dict[str, Any],
) -> Generator[Event, None, tuple[EngineFigures, list[Check]]]:
    """The same text through llama.cpp: ids, BOS, template, logits; yields each Check as it is known.

    The logits are judged by what the runtime's own arithmetic predicts. Raises ConversionError where
    llama.cpp is not installed or does not load the file.
    """
    from dsconvert.proof import runtime
    from dsconvert.runtimes.llamacpp import Engine

    own, windows = handling(reference, opened), chosen_text.windows
    pages = identity.comparable(own, chosen_text.pages)
    place = st.pick_device(where["device"])
    dtype = st.pick_dtype(where["dtype"], place)
    sides = ((reference.source, reference.config), (opened.source, opened.config))
    pair = tuple(st.open_decoder(source, config, place, dtype) for source, config in sides)
    with Engine(opened.path, n_ctx=windows.length, threads=usable_cores()) as engine:
        checks = runtime.check_engine_text(
            engine, pages, encode(own.tokenizer, pages), reference.tokenizer.first_id, own.template
        )
        yield from checks
        found = yield from runtime.engine_figures(engine, (pair[0], pair[1]), windows, comparison.states)
    judged = runtime.judge_engine(found, limits)
    yield from judged
    return found, [*checks, *judged]


def compare_output(
    opened: Opened,
    reference: Reference,
    chosen_text: Text,
    asked: ProofOptions,
    where: dict[str, Any],
) -> Generator[Event, None, Comparison]:
    """Both models over the windows, or the output against a file of the base's log-probabilities."""
    config, windows, lengths = (
        reference.config,
        chosen_text.windows,
        np.array(reference.tokenizer.token_bytes, np.int64),
    )
    if asked.kld_base is not None:
        if os.path.lexists(asked.kld_base):
            base = logprob_file.open_base(asked.kld_base)
            scored = yield from logprob_file.compare_base(
                base, opened.source, opened.config, token_bytes=lengths, **where
            )
            return replace(scored, config=comparing.config_differences(config, opened.config))
        yield from logprob_file.write_base(asked.kld_base, reference.source, config, windows, **where)
        yield Step(f"wrote {asked.kld_base}")
    mode: Any = "quick" if asked.effort == "quick" and not asked.engine else "full"
    chosen = time_budget.choose(config, windows, mode, asked.device)
    yield Step("verifying " + chosen.text)
    found = yield from time_budget.run(
        reference.source, opened.source, config, chosen, candidate_config=opened.config,
        token_bytes=lengths, keep_states=asked.engine is not None, **where,
    )  # fmt: skip
    if chosen.blocks is None:
        return found
    yield Step("comparing some rows of every other tensor")
    others = time_budget.sample_tensors(reference.source, opened.source, found.tensors, config.head_dim)
    return replace(found, tensors=(*found.tensors, *others))


def provenance(
    opened: Opened, reference: Reference, chosen_text: Text, where: dict[str, Any], comparison: Comparison
) -> dict[str, str]:
    """What was compared with what, on which text, by which versions."""
    import torch
    import transformers

    place = st.pick_device(where["device"])
    scored = 0 if comparison.figures is None else comparison.figures.tokens
    return {
        "output": str(opened.path),
        "kind": f"{opened.kind} {opened.quant}, {opened.bits:.3f} bits per weight, {opened.nbytes} bytes",
        "reference": reference.name or reference.folder.name,
        "text": f"{chosen_text.source}; windows of {chosen_text.windows.length} tokens, "
        f"{scored} predictions scored",
        "arithmetic": f"{str(st.pick_dtype(where['dtype'], place)).removeprefix('torch.')} on {place}",
        "versions": f"dsconvert {dsconvert.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
