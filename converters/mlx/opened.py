"""An MLX folder opened for the proof: its weights, its tokenizer, what it says of itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from converters.mlx.reader import open_model
from dsconvert.proof.sources import Opened
from dsconvert.quantization.opened import opened_folder


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """An MLX folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    count: Counter[Any] = Counter()
    for one in model.linears.values():
        count[one.settings] += one.outputs * one.inputs
    most = count.most_common(1)[0][0]
    bits = " and ".join(str(width) for width in sorted({one.bits for one in count}))
    linears = f"{len(model.linears)} matrices of {bits} bits"
    return opened_folder(path, model, "MLX", most.label, most.type, linears)
