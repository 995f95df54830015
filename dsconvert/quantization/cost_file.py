"""The file that keeps what types cost, for outputs of other sizes: JSON, by the names of tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.output_files import write_file
from dsconvert.errors import CheckpointError
from dsconvert.reading import RECORD, read_object

REMAKE = "Leave --measurement out, or name a new file, and it is made anew"
METHOD = 2  # how costs are measured: those of another method are not comparable
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Known:
    """Nats by name and type; of GGUF the importance of embedding and head too, float32 [d] by name."""

    nats: dict[str, dict[str, float]]
    importance: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the nats: what --resume knows them by."""
        return hashlib.sha256(json.dumps(self.nats, sort_keys=True).encode()).hexdigest()


def save(path: Path, known: Known, shapes: Shapes, solver: str) -> None:
    """Write costs that were measured for a solver; raises OutputError, also when one is there now."""
    found = {
        "method": METHOD,
        "solver": solver,
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "nats": known.nats,
        "importance": {name: values.tolist() for name, values in known.importance.items()},
    }
    write_file(path, (json.dumps(found) + "\n").encode(), replace=False)


def load(path: Path, shapes: Shapes, types: Mapping[str, tuple[str, ...]], solver: str) -> Known:
    """Read the costs of tensors of these shapes in these types; CheckpointError for a file without them."""
    found = read_object(path, RECORD, hint=REMAKE)
    try:
        known, stated = _parsed(found), {name: tuple(shape) for name, shape in found["shapes"].items()}
    except Exception as error:  # of any kind: the file may be anyone's
        raise CheckpointError(
            "is not a readable measurement of costs",
            where=path,
            why=f"{type(error).__name__}: {str(error)[:120]}",
            hint=REMAKE,
        ) from None
    if stated != dict(shapes):
        raise _other(path, "is of another model", "its tensors are not this model's, or of other shapes")
    if found.get("method") != METHOD:
        raise _other(path, "is of another version of dsconvert", "its costs are of another method")
    if found.get("solver") != solver:
        raise _other(path, "is for another solver", f"it was measured for {found.get('solver')!s:.80}")
    for name, kinds in types.items():
        lacking = [kind for kind in kinds if kind not in known.nats.get(name, {})]
        if lacking:
            raise _other(path, f"has no cost of {name} in {lacking[0]}", "it was measured with other --types")
    return known


def _other(path: Path, what: str, why: str) -> CheckpointError:
    return CheckpointError(what, where=path, why=why, hint=REMAKE)


def _parsed(found: Mapping[str, Any]) -> Known:
    nats = {
        str(name): {str(kind): float(cost) for kind, cost in costs.items()}
        for name, costs in found["nats"].items()
    }
    importance = {str(n): np.array(values, np.float32) for n, values in found["importance"].items()}
    sound = all(math.isfinite(cost) and cost >= 0 for costs in nats.values() for cost in costs.values())
    if not sound or not all(np.isfinite(v).all() and (v >= 0).all() for v in importance.values()):
        raise ValueError("a cost or an importance is negative or no number")
    return Known(nats, importance)
