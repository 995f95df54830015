"""The proof of one output against its checkpoint, the same for every command that makes or judges one."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

import dsconvert
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import UsageError
from dsconvert.events import Check, Event, Step, Warn
from dsconvert.libraries import TORCH, lacking, need
from dsconvert.machine import free_memory, usable_cores
from dsconvert.models.config import ModelConfig
from dsconvert.proof import compare as comparing
from dsconvert.proof import logprob_file
from dsconvert.proof.block_sample import compare_blocks, sample_tensors
from dsconvert.proof.checks import judge, verdict
from dsconvert.proof.compare import Comparison
from dsconvert.proof.config_differences import check_sizes, config_differences
from dsconvert.proof.effort import Effort, choose
from dsconvert.proof.ended import ended
from dsconvert.proof.figures import IntArray
from dsconvert.proof.numpy_compare import compare_in_numpy, knows
from dsconvert.proof.options import Mode, ProofOptions
from dsconvert.proof.result import Report
from dsconvert.proof.routing import routed_limits
from dsconvert.proof.runtime_rule import judge_rule, rule_for
from dsconvert.proof.sources import Opened, Reference, StoredTensors, limits_name
from dsconvert.proof.sparse import sparse_limits
from dsconvert.proof.structure import check_structure, structure_faults
from dsconvert.proof.text import Text, check_text, choose_text, handling
from dsconvert.proof.thresholds import Thresholds, thresholds_for
from dsconvert.proof.types_by_cost import types_by_cost
from dsconvert.texts.defaults import LENGTH
from dsconvert.texts.windows import Windows
from tokenizer_tools import identity
from tokenizer_tools.library import decode
from tokenizer_tools.library import ids as encode

if TYPE_CHECKING:
    from dsconvert.proof.runtime import EngineFigures


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
    opened: Opened,
    reference: Reference,
    asked: ProofOptions,
    companion: Companion | None = None,
    planned: StoredTensors | None = None,
) -> Generator[Event, None, Proof]:
    """Verify one output: yields steps and Checks, returns the report with the verdict over all of them.

    `planned` are the tensors that a conversion meant to write. Raises ConversionError when something cannot
    be compared at all: a file that cannot be read, another model, text that is too short. What can be
    compared and is wrong is a failed Check.

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
    check_sizes(reference.config, opened.config, but=("layers",))
    changes = {"max_kld": asked.max_kld, "max_ppl_ratio": asked.max_ppl_ratio, "min_top1": asked.min_top1}
    limits = thresholds_for(limits_name(opened), **changes)
    if reference.config.experts is not None:
        limits = routed_limits(limits, asked.max_kld)
    chosen_text = yield from choose_text(reference, asked)
    yield Step(f"{opened.path}: {opened.kind} {opened.quant}, {opened.bits:.2f} bits per weight")
    faults = structure_faults(opened, reference)
    checks = [check_structure(opened, faults, planned), *opened.own(reference)]
    checks += check_text(opened, reference, chosen_text.pages)
    yield from checks
    dtype = asked.dtype or ("float32" if asked.engine else None)  # the runtime computes in float32
    where: dict[str, Any] = {"device": asked.device, "dtype": dtype}
    mode: Mode = "quick" if asked.effort == "quick" and not asked.engine else "full"
    chosen = choose(reference.config, chosen_text.windows, mode, free_memory())
    limits, said_of_keys = sparse_limits(limits, reference.config, chosen.windows.length, asked)
    if said_of_keys:
        yield Step(said_of_keys)
    if faults:
        yield Step("comparing rows of the tensors that both have; models of other tensors are not run")
        comparison = compare_rows(opened, reference, asked, chosen)
    else:
        comparison = yield from compare_output(opened, reference, chosen_text.windows, chosen, asked, where)
    found = list(judge(comparison, limits).checks)
    yield from found
    if opened.kind == "GGUF" and comparison.states is not None:
        own = comparison.states[1]
        found += yield from judge_rule(opened.source, opened.config, own, chosen.windows, **where)
    engine = None
    if asked.engine and comparison.tokens is not None:
        engine, others = yield from run_engine(opened, reference, chosen_text, limits, comparison, where)
        found += others
    if companion is not None and not faults:
        found += yield from companion.check()
    check_unchanged(reference.checkpoint.seen)  # else something else was compared
    said = verdict([*checks, *found])
    plain = bool(faults) or chosen.blocks == () or in_numpy(reference.config, opened.config, chosen, asked)
    report = Report(
        title=f"{opened.path.name} against {reference.title}",
        comparison=comparison,
        verdict=said,
        limits=limits,
        windows=chosen.windows,
        sizes=opened.sizes,
        provenance=provenance(opened, reference, chosen_text, {} if plain else where, comparison)
        | ({} if companion is None else {"projector": companion.said}),
        engine=engine,
        decode=partial(decode, reference.tokenizer.tokenizer),
    )
    return Proof(opened, report)


def prove_conversion(
    opened: Opened, reference: Reference, asked: ProofOptions, planned: StoredTensors | None
) -> Generator[Event, None, Proof]:
    """As `prove`, of what a conversion just wrote; ends with a line on the perplexities, if there are any,
    and a Proven.
    """
    proof = yield from prove(opened, reference, asked, planned=planned)
    figures = proof.report.comparison.figures
    if figures is not None:
        yield Step(
            f"perplexity {figures.ppl.value:.3f}, of the checkpoint {figures.ppl_base.value:.3f}, "
            f"over {figures.tokens} predictions"
        )
    yield ended(opened, reference, proof.report)
    return proof


def compare_rows(opened: Opened, reference: Reference, asked: ProofOptions, chosen: Effort) -> Comparison:
    """Rows of the tensors that both have, all of a small model's; for models that cannot both be run."""
    pair, head_dim = (reference.source, opened.source), reference.config.head_dim
    tensors = sample_tensors(pair, (), head_dim, asked.threads, every=chosen.small)
    differing = config_differences(reference.config, opened.config)
    return Comparison(None, None, (), tensors, differing)


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
        types = {name: str(kind) for name, _, kind in opened.stored}
        found = yield from runtime.engine_figures(
            engine, (pair[0], pair[1]), windows, comparison.states, types
        )
    judged = runtime.judge_engine(found, limits)
    yield from judged
    return found, [*checks, *judged]


def compare_output(
    opened: Opened,
    reference: Reference,
    windows: Windows,
    chosen: Effort,
    asked: ProofOptions,
    where: dict[str, Any],
) -> Generator[Event, None, Comparison]:
    """Both models as far as chosen, or the output against a file of the base's log-probabilities.

    `windows` are all that were asked for, which such a file is written of.
    """
    pair, config, base = (reference.source, opened.source), reference.config, asked.kld_base
    tokenizer = reference.tokenizer
    lengths = np.array(tokenizer.token_bytes, np.int64) if chosen.blocks is None else None
    if base is not None and os.path.lexists(base):
        known = logprob_file.open_base(base)
        scored = yield from logprob_file.compare_base(
            known, opened.source, opened.config, token_bytes=lengths, **where
        )
        return replace(scored, config=config_differences(config, opened.config))
    if base is not None:
        yield from logprob_file.write_base(base, reference.source, config, windows, **where)
        yield Step(f"wrote {base}")
    yield Step("verifying " + chosen.text)
    if chosen.blocks == ():
        return compare_rows(opened, reference, asked, chosen)
    if in_numpy(config, opened.config, chosen, asked):
        found = yield from compare_in_numpy(*pair, config, chosen, opened.config, asked.threads, lengths)
    else:
        found = yield from compare_in_torch(opened, reference, chosen, asked, where, lengths)
    if chosen.blocks is None:
        return found
    names = {tensor.name for tensor in found.tensors}
    others = sample_tensors(pair, names, config.head_dim, asked.threads)
    return replace(found, tensors=(*found.tensors, *others))


def in_numpy(config: ModelConfig, other: ModelConfig, chosen: Effort, asked: ProofOptions) -> bool:
    """Whether numpy runs the models: where loading torch would take longer than that, and it knows them."""
    if asked.names_arithmetic or not (chosen.small or chosen.blocks is not None):
        return False
    return knows(config, other, chosen.windows)


def check_libraries(config: ModelConfig, asked: ProofOptions, instead: str = "") -> None:
    """Raises MissingLibrary where a proof of a model of this config would need torch, and that is missing.

    To be asked before the work that ends with the proof; `instead` is what can be done without torch.
    """
    if not lacking(*TORCH):
        return
    length = asked.length or LENGTH
    windows = Windows(np.zeros((asked.windows, length), np.int64), np.zeros(asked.windows, np.int64))
    chosen = choose(config, windows, "quick" if asked.effort == "quick" else "full", free_memory())
    if not in_numpy(config, config, chosen, asked):
        need(*TORCH, what=f"the proof of this model ({chosen.text})", instead=instead)


def compare_in_torch(
    opened: Opened,
    reference: Reference,
    chosen: Effort,
    asked: ProofOptions,
    where: dict[str, Any],
    lengths: IntArray | None,
) -> Generator[Event, None, Comparison]:
    """Both models as far as chosen, by transformers' own modules on the device asked for."""
    pair, config = (reference.source, opened.source), reference.config
    use_threads(asked.threads)
    if chosen.blocks is not None:
        return (
            yield from compare_blocks(
                *pair, config, chosen.windows, chosen.blocks, candidate_config=opened.config, **where
            )
        )
    return (
        yield from comparing.compare(
            *pair, config, chosen.windows, candidate_config=opened.config, token_bytes=lengths,
            keep_states=asked.engine is not None or rule_for(config) is not None, **where,
        )
    )  # fmt: skip


def use_threads(count: int) -> None:
    """Let torch compute on so many threads, where a number was asked for."""
    import torch

    if count:
        torch.set_num_threads(count)


def provenance(
    opened: Opened, reference: Reference, chosen_text: Text, where: dict[str, Any], comparison: Comparison
) -> dict[str, str]:
    """What was compared with what, on which text, by which versions; `where` says by torch, {} by numpy."""
    arithmetic = "float32 on cpu, in numpy"
    if where:
        place = st.pick_device(where["device"])
        arithmetic = f"{str(st.pick_dtype(where['dtype'], place)).removeprefix('torch.')} on {place}"
    scored = 0 if comparison.figures is None else comparison.figures.tokens
    libraries = ["torch", "transformers"] if where else ["numpy"]
    versions = [f"{name} {version(name)}" for name in libraries]
    return {
        "output": str(opened.path),
        "kind": f"{opened.kind} {opened.quant}, {opened.bits:.3f} bits per weight, {opened.nbytes} bytes",
        "reference": reference.name or reference.folder.name,
        "text": f"{chosen_text.source}; windows of {chosen_text.windows.length} tokens, "
        f"{scored} predictions scored",
        "arithmetic": arithmetic,
        "versions": ", ".join([f"dsconvert {dsconvert.__version__}", *versions]),
    } | types_by_cost(opened)
