"""An MLX folder opened for the proof: its weights, its tokenizer, what it says of itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from converters.mlx.reader import PARTS, open_model
from dsconvert.models.language_model import language_model
from dsconvert.proof.sources import Opened, folder_text, stored_sizes
from dsconvert.quantization.tower_files import check_copies


def open_folder(path: Path, stated: dict[str, Any] | None = None) -> Opened:
    """An MLX folder as an output to be proven; raises what reading it raises.

    config.json is read unless that is `stated`.
    """
    model = open_model(path, stated)
    config = model.checkpoint.config
    source, decoder = language_model(model, config, path / "config.json", partial=True)
    count: Counter[Any] = Counter()
    for one in model.linears.values():
        count[one.settings] += one.outputs * one.inputs
    most = count.most_common(1)[0][0]
    sizes = stored_sizes(model, model.checkpoint, model.linears, PARTS)
    text = folder_text(path, config.vocab_size)
    stored = frozenset((name, shape, model.dtype(name)) for name, shape in model.shapes().items())
    kept = len(stored) - len(model.linears)
    bits = " and ".join(str(width) for width in sorted({one.bits for one in count}))
    return Opened(
        path, "MLX", most.label, most.type, source, decoder, text, sizes, model.checkpoint.nbytes, stored,
        f"{len(model.linears)} matrices of {bits} bits, {kept} tensors kept",
        own=lambda reference: check_copies(model.checkpoint, config, reference),
    )  # fmt: skip
