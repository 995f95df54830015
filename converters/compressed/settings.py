"""What a compressed-tensors folder says of its quantization."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from converters.compressed.schemes import Row, integer_weights
from dsconvert import __version__
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.linears import Selection

Groups = list[tuple[list[str], Mapping[str, object]]]  # patterns, and what is said of weights
NUMBERED = re.compile(r"(.*?)layers\.([0-9]+)\.(.*)")
EXPERT = re.compile(r"\.experts\.[0-9]+\.")  # all of a layer have one scheme
EMBEDDINGS = ("embed_tokens", "wte")
HEAD = "lm_head"


def quantization_settings(
    scheme: Row, groups: Groups, ignored: list[str], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """The block that readers need, `quantization_config` of config.json.

    `groups` are patterns of linears and what it says of their weights, `ignored` the linears that stay as
    they are, `provenance` what the weights depend on besides the checkpoint.
    """
    activations = None if scheme.activations is None else dict(scheme.activations)
    about = {"input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignored,
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": dict(weights), **about}
            for i, (targets, weights) in enumerate(groups)
        },
        "meta": {"quantizer": [f"dsconvert:{__version__}"], **provenance},
    }


def groups_of(schemes: Mapping[str, Scheme]) -> Groups:
    """The groups of linears by their schemes, the widest first; `schemes` by the linears' own names."""
    widest = sorted(set(schemes.values()), key=lambda one: (-one.bits, one.group_size))
    return [
        (patterns([stem for stem, own in schemes.items() if own == scheme]), integer_weights(scheme))
        for scheme in widest
    ]


def patterns(stems: Iterable[str]) -> list[str]:
    """Regular expressions that match these linears and no others of the model.

    They begin anywhere in a name: runtimes call the part before the layers as they like.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    found = []
    for stem in stems:
        part = NUMBERED.fullmatch(stem)
        if part is None:
            found.append("re:.*" + re.escape(stem) + "$")
            continue
        rest = EXPERT.pattern.join(map(re.escape, EXPERT.split(part[3])))
        numbers = layers.setdefault((_within(part[1]), rest), [])
        numbers += [part[2]] if part[2] not in numbers else []
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (within, rest), numbers in layers.items():
        alike.setdefault((within, tuple(numbers)), []).append(rest)
    for (within, numbered), rests in alike.items():
        found.append(rf"re:{within}layers\.(?:{'|'.join(numbered)})\.(?:{'|'.join(rests)})$")
    return found


def _within(before: str) -> str:
    """What stands before the layers, as far as it tells one decoder of a model from another."""
    inner = [part for part in before.split(".") if part not in ("", "model")]
    return ".*" + "".join(re.escape(part) + r"\..*" for part in inner)


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
