"""What a compressed-tensors folder says of its quantization."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from converters.compressed.schemes import Row
from dsconvert import __version__
from dsconvert.quantization.linears import Selection

EMBEDDINGS = ("embed_tokens", "wte")
HEAD = "lm_head"


def quantization_settings(
    scheme: Row, weights: Mapping[str, object], ignored: list[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The block that readers need, `quantization_config` of config.json.

    `weights` is what it says of weights, `ignored` the linears that stay as they are, `provenance` what the
    weights depend on besides the checkpoint.
    """
    activations = None if scheme.activations is None else dict(scheme.activations)
    group = {"targets": ["Linear"], "weights": dict(weights), "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {"group_0": {**group, "output_activations": None}},
        "meta": {"quantizer": [f"dsconvert:{__version__}"], **provenance},
    }


def ignored_linears(model: Selection) -> list[str]:
    """The linears that stay as they are, by name; of parts that hold none that is quantized one pattern.

    The head is named also where it is the embedding: readers make a linear of it.
    """
    stored, inside = model.checkpoint.tensors, {_part(linear.stem) for linear in model.linears.values()}
    found: dict[str, None] = {}
    for out, name in model.kept.items():
        stem = out.removesuffix(".weight")
        if stem == out or len(stored[name].shape) != 2 or stem.endswith(EMBEDDINGS):
            continue
        part = _part(stem)
        alone = part == stem or part in inside
        found[stem if alone else "re:" + re.escape(part) + r"\..*"] = None
    heads = {linear.stem for linear in model.linears.values() if linear.role == "head"}
    return list(found) if heads or HEAD in found else [*found, HEAD]


def _part(stem: str) -> str:
    """The part of a model that a tensor is of: model.language_model, model.vision_model, lm_head."""
    return ".".join(stem.split(".")[:2])
