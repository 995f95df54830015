"""Architecture tables, by Hugging Face class name."""

from __future__ import annotations

from dsconvert.arch import Arch
from dsconvert.archs.deepseek_vl import LANGUAGE, LANGUAGE_ORIGINAL
from dsconvert.archs.llama import LLAMA

ARCHS: dict[str, Arch] = {
    name: arch for arch in (LLAMA, LANGUAGE_ORIGINAL, LANGUAGE) for name in arch.classes
}
BY_GGUF_NAME: dict[str, Arch] = {LLAMA.name: LLAMA}
