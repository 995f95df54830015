"""Architecture tables, by Hugging Face class name."""

from __future__ import annotations

from pathlib import Path

from dsconvert.errors import CheckpointError
from dsconvert.models.architectures.deepseek_vl import LANGUAGE, LANGUAGE_ORIGINAL
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.tensor_table import Arch

ARCHS: dict[str, Arch] = {
    name: arch for arch in (LLAMA, LANGUAGE_ORIGINAL, LANGUAGE) for name in arch.classes
}
BY_GGUF_NAME: dict[str, Arch] = {LLAMA.name: LLAMA}


def find_arch(name: str, where: Path | None = None) -> Arch:
    """The table for a class; raises CheckpointError, which names the file `where`, when there is none."""
    arch = ARCHS.get(name)
    if arch is None:
        raise CheckpointError(
            f"architecture {name[:80]!r} has no table",
            where=where,
            why=f"tables exist for {', '.join(sorted(ARCHS))}",
            hint='A model of the same layout converts when "architectures" names one of these classes',
        )
    return arch
