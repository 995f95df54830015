"""Classes that are recognised and not converted, each with the reason."""

from __future__ import annotations

from dsconvert.models.architecture import Architecture

_ELSEWHERE = "llama.cpp's own converter makes GGUF files of it"
REFUSED: dict[str, str] = {
    "DeepseekV4ForCausalLM": (
        "its attention is compressed, hyper-connections join its layers, its experts are stored in fp4: "
        f"none of this is converted here; {_ELSEWHERE} (deepseek4)"
    ),
    "DeepseekV41ForCausalLM": (
        "beside what V4 has it looks tables up by tokens (engrams), which neither transformers 5.23 nor the "
        "llama.cpp of that time runs"
    ),
    "DeepseekVLV2ForCausalLM": "neither transformers nor llama.cpp has this class, so no runtime reads it",
}
ARCHITECTURES: tuple[Architecture, ...] = ()
