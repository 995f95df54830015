"""What is proven of a folder that dsconvert wrote beside its weights: the files that it copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.source_files import companions
from dsconvert.events import Check


def is_ours(stated: Mapping[str, Any]) -> bool:
    """Whether dsconvert wrote a quantized folder, by what its config.json states."""
    settings = stated.get("quantization_config")
    meta = settings.get("meta") if isinstance(settings, dict) else None
    quantizer = meta.get("quantizer") if isinstance(meta, dict) else None
    first = quantizer[0] if isinstance(quantizer, list) and quantizer else ""
    return isinstance(first, str) and first.startswith("dsconvert:")


def check_companions(source: Path, out: Path, made: Collection[str] = ()) -> Check:
    """Tokenizer and generation files of the folder `out` are those of `source`, byte by byte.

    Those called as in `made` are not copies: they were made for another layout.
    """
    files = [file for file in companions(source) if file.name not in made]
    lost = [f.name for f in files if not (out / f.name).is_file()]
    wrong = [f.name for f in files if f.name not in lost and (out / f.name).read_bytes() != f.read_bytes()]
    told = [f"{what}: {', '.join(names)}" for what, names in (("missing", lost), ("differ", wrong)) if names]
    detail = "; ".join(told) or f"{len(files)} files as in the checkpoint"
    return Check("tokenizer", not told, detail, len(lost) + len(wrong))
