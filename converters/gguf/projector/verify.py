"""Projectors in `dsconvert verify`, alone or by `--mmproj` with a text file: a conversion's proof of them."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

from converters.gguf.parse import GGUFFile, open_gguf
from converters.gguf.projector import proof as projector_proof
from converters.gguf.projector.completeness import completeness
from converters.gguf.projector.keys import is_projector
from dsconvert.errors import UsageError
from dsconvert.events import Check, Event
from dsconvert.proof.options import Mode, ProofOptions
from dsconvert.proof.sources import Opened, Reference, limits_name
from dsconvert.vision.plan import plan_towers

USAGE = "dsconvert verify TEXT.gguf --against MODEL_PATH --mmproj MMPROJ.gguf"


@dataclass(frozen=True)
class Pair:
    """A text file with the projector beside it, and the checkpoint that both are held against.

    `limit` bounds the mean KL divergence of a question about a picture, `said` is a line for the report.
    """

    model: projector_proof.Pictured
    text: GGUFFile
    projector: GGUFFile
    limit: float
    said: str
    mode: Mode


def is_projector_file(path: Path) -> bool:
    """Whether `path` is a GGUF file with the towers of a model, and no language model."""
    return path.suffix == ".gguf" and os.path.isfile(path) and is_projector(open_gguf(path))


def prove_projector(reference: Reference, path: Path) -> Iterator[Event]:
    """Prove a projector file against the checkpoint: complete, its weights, a picture's embeddings.

    Raises ConversionError when something cannot be compared at all.
    """
    model = with_towers(reference)
    if model is None:
        raise UsageError("the checkpoint has no vision tower", where=reference.folder)
    yield from projector_proof.prove_pair(model, open_gguf(path))


def with_towers(reference: Reference) -> projector_proof.Pictured | None:
    """The checkpoint with its towers; None where it has none."""
    checkpoint, config, tokenizer = reference.checkpoint, reference.whole, reference.tokenizer
    towers = plan_towers(checkpoint, config, tokenizer)
    return None if towers is None else projector_proof.Pictured(checkpoint, config, tokenizer, towers)


def check_files(output: Path, mmproj: Path) -> None:
    """Raises ConversionError unless the two files are another's, `mmproj` a projector and `output` none."""
    if os.path.exists(output) and os.path.exists(mmproj) and output.samefile(mmproj):
        raise UsageError("OUTPUT and --mmproj are the same file", where=output, hint=USAGE)
    if is_projector_file(output):
        raise UsageError("OUTPUT should be the text file, and is a projector", where=output, hint=USAGE)
    projector = open_gguf(mmproj)
    if not is_projector(projector):
        found = f"its architecture is {projector.keys.get('general.architecture')!r}, not 'clip'"
        raise UsageError("--mmproj should be a projector", where=mmproj, why=found, hint=USAGE)


def open_pair(opened: Opened, mmproj: Path, reference: Reference, asked: ProofOptions) -> Pair:
    """The pair of an output and its projector; no weight is read. A `max_kld` asked for holds for pictures
    too.

    Raises UsageError for an output or a checkpoint without pictures, CheckpointError for a projector of
    another model.
    """
    if opened.kind != "GGUF":
        raise UsageError(
            "--mmproj goes with a GGUF file",
            where=opened.path,
            why=f"this is a folder ({opened.kind}), which holds its towers itself",
            hint="Verify it without --mmproj",
        )
    model = with_towers(reference)
    if model is None:
        raise UsageError(
            "--mmproj asks about pictures, and the checkpoint has no vision tower",
            where=reference.folder,
            hint="Leave --mmproj out, or give the checkpoint with towers as --against",
        )
    projector = open_gguf(mmproj)
    complete = all(check.passed for check in completeness(projector))
    if complete:  # else a failed check says what is missing
        projector_proof.same_towers(model, projector)
    quant = projector_proof.projector_quant(projector) if complete else "incomplete"
    usual = projector_proof.limit_of(limits_name(opened), quant) if complete else 0.0
    limit = usual if asked.max_kld is None else asked.max_kld
    return Pair(
        model,
        open_gguf(opened.path),
        projector,
        limit,
        f"{mmproj}, {quant}",
        "quick" if asked.effort == "quick" else "full",
    )


def check_pair(pair: Pair) -> Generator[Event, None, list[Check]]:
    """Yields what is found of the pair, and returns the Checks."""
    checks = []
    events = projector_proof.prove_pair(pair.model, pair.projector, [(pair.text, pair.limit)], mode=pair.mode)
    for event in projector_proof.of_projector(events):
        if isinstance(event, Check):
            checks.append(event)
        yield event
    return checks
