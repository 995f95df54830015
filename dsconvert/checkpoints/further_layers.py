"""Takes the layers out of a checkpoint that follow the last one of its decoder and predict further tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dsconvert.checkpoints.safetensors_reader import Stored

LAYER = re.compile(r"(model\.layers\.(\d+)\.).+")
PROJECTION = "eh_proj.weight"  # from embedding and state to state: no layer of a decoder has it


def without_further_layers(
    tensors: Mapping[str, Stored], config: Mapping[str, Any]
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The tensors without those of multi-token prediction (MTP), and a note on what was left out.

    A layer beyond `num_hidden_layers` of config.json that has no such projection is kept: the count is wrong.
    """
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int):
        return dict(tensors), ()
    numbers = {name: int(found[2]) for name in tensors if (found := LAYER.fullmatch(name))}
    further = {i for i in numbers.values() if i >= layers and f"model.layers.{i}.{PROJECTION}" in tensors}
    if not further:
        return dict(tensors), ()
    dropped = {name for name, i in numbers.items() if i in further}
    layer = f"layer {min(further)}" if len(further) == 1 else f"layers {min(further)} to {max(further)}"
    note = (
        f"left out: {layer}, {len(dropped):,} tensors that predict further tokens (MTP) and have no "
        "part in the next one's"
    )
    return {name: tensor for name, tensor in tensors.items() if name not in dropped}, (note,)
