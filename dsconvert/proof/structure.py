"""Whether an output holds the tensors of its checkpoint: names, shapes and types, no weight read."""

from __future__ import annotations

import re
from collections.abc import Collection

from dsconvert.decoder.numpy_decoder import HEAD
from dsconvert.events import Check
from dsconvert.models.architectures import find_architecture
from dsconvert.models.tensor_table import plan
from dsconvert.proof.sources import Opened, Reference, StoredTensors


def structure_faults(opened: Opened, reference: Reference) -> list[str]:
    """Where an output's tensors are not those that the checkpoint's table names; models can be run without.

    A head that one of them lacks is not a fault: the embedding takes its place, and the rows of both are
    compared. Raises PlanError where the checkpoint itself is not what its config says.
    """
    config, found = reference.config, opened.source.shapes()
    table = find_architecture(config.architecture).table
    specs = plan(table, config, reference.source.shapes())
    wanted = {name: spec.source for spec in specs for name in spec.names}
    missing = [name for name in wanted if name not in found and name != HEAD]
    unknown = [
        name
        for name in found
        if name not in wanted and name != HEAD and not any(re.fullmatch(drop, name) for drop in table.drop)
    ]
    misshapen = [name for name in wanted if name in found and tuple(found[name]) != wanted[name]]
    faults = list(opened.strange)
    if opened.config.layers != config.layers:
        faults.append(f"{opened.config.layers} layers, the checkpoint has {config.layers}")
    for names, what in (
        (missing, "missing"),
        (unknown, "not in the checkpoint"),
        (misshapen, "of another shape than the checkpoint's"),
    ):
        if names:
            faults.append(f"{counted(names)} {what}, the first is {names[0]}")
    return faults


def check_structure(opened: Opened, faults: list[str], planned: StoredTensors | None) -> Check:
    """The output has no such faults, and where a conversion `planned` it, is what was planned."""
    differing: Collection[tuple[str, tuple[int, ...], object]] = set()
    if planned is not None:
        differing = planned ^ opened.stored
    told = list(faults)
    if differing:
        names = sorted({name for name, _, _ in differing})
        told.append(f"{counted(names)} not as planned, the first is {names[0]}")
    return Check("structure", not told, "; ".join(told) or opened.holds, len(told))


def counted(names: Collection[str]) -> str:
    """How many tensors, with a verb."""
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"
