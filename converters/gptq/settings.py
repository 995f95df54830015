"""What a GPTQ folder says of its quantization."""

from __future__ import annotations

from typing import Any

from converters.gptq.shapes import Layout
from dsconvert import __version__


def quantization_settings(layout: Layout, damp: float, lm_head: bool = False) -> dict[str, Any]:
    """The block that readers need: `quantization_config` of config.json, and quantize_config.json.

    `damp` is the damping asked for, `lm_head` whether the head is quantized too.
    """
    scheme = layout.scheme
    return {
        "quant_method": "gptq",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "desc_act": layout.desc_act,
        "sym": scheme.sym,
        "lm_head": lm_head,
        "checkpoint_format": layout.checkpoint_format,
        "true_sequential": True,
        "damp_percent": damp,
        "meta": {"quantizer": [f"dsconvert:{__version__}"]},
    }
