"""Writes a GGUF file again with something changed: what another program or a fault might have left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.gguf.layout import Tensor, lay_out
from converters.gguf.parse import GGUFFile


def edited(
    file: GGUFFile, out: Path, keys: dict[str, Any], drop: str = "", stored: Mapping[str, Any] | None = None
) -> Path:
    """The file with keys replaced (None: removed), a tensor left out, and other bytes `stored` in some."""
    typed = {name: value for name, value in (file.typed | keys).items() if value is not None}
    tensors = [Tensor(t.name, t.shape, t.qtype) for t in file.tensors.values() if t.name != drop]
    layout = lay_out(out.name, typed, tensors)
    data = bytearray(layout.nbytes)
    data[: len(layout.head)] = layout.head
    for tensor in tensors:
        at = layout.offsets[tensor.name]
        blocks = (stored or {}).get(tensor.name)
        data[at : at + tensor.nbytes] = (
            file.tensors[tensor.name].blocks() if blocks is None else blocks
        ).tobytes()
    out.write_bytes(data)
    return out
