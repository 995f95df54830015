"""Recognises checkpoints that are not plain 16-bit ones by their tensors' names, and says what helps."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PLAIN = frozenset(("bf16", "f16", "f32", "f64"))  # the types of weights as they are
# Methods whose 16-bit weights are quantized anew in every forward pass: without it they are another model.
IN_FORWARD = frozenset(("bitnet",))
DECODER_KEYS = ("text_config", "language_config")  # where config.json of a bigger model keeps its decoder's
KEYS_OF_METHOD = (
    "quantization_config",
    "quantization",
)  # what a config says of quantization; the second MLX's
SOURCE = "Convert the 16-bit checkpoint that it was made from: each quantization loses"


@dataclass(frozen=True)
class Form:
    """A form of checkpoints: the pattern of tensor names that identifies it, what it is, what to do."""

    pattern: str
    what: str
    hint: str


_BNB = (
    f"{SOURCE}. Where there is none, load it with transformers, call model.dequantize() and "
    "model.save_pretrained(FOLDER)"
)
QUANTIZED = (
    Form(r"\.(qweight|qzeros)", "GPTQ or AWQ", SOURCE),
    Form(r"\.q_weight", "EXL2", SOURCE),
    Form(r"\.biases", "MLX", SOURCE),
    Form(r"\.weight_packed", "compressed-tensors", SOURCE),
    Form(r"\.(weight_scale_inv|weight_scale|scale_weight)", "fp8", SOURCE),
    Form(r"\.(absmax|nested_absmax|quant_map|nested_quant_map|quant_state\..+)", "bitsandbytes 4-bit", _BNB),
    Form(r"\.(SCB|weight_format)", "bitsandbytes 8-bit", _BNB),
    Form(r"\.(W_q|codebooks|qidxs)", "HQQ, AQLM or QuIP#", SOURCE),
)
UNFIT = (
    Form(
        r".*(\.base_layer\.|\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|\.modules_to_save\.).*",
        "hold LoRA's matrices beside the weights: they are not merged",
        "Load it with peft, merge_and_unload(), then save_pretrained(FOLDER)",
    ),
    Form(
        r".*\.(qkv_proj|gate_up_proj|W_pack|query_key_value|wqkv|c_attn)\..*",
        "hold several matrices fused into one, which is another layout",
        "Split them first: q_proj, k_proj, v_proj, gate_proj and up_proj have tensors of their own here",
    ),
    Form(
        r".*\.mlp\.(experts\.|gate\.weight|shared_expert).*",
        "are of a mixture of experts, which is not converted here",
        "Only dense models are",
    ),
    Form(
        r"(.+\.)?(score|classifier|qa_outputs|reward_head|value_model)\..+",
        "are of a classifier or a reward model, which generates no text",
        "Give a checkpoint with a language model's head",
    ),
    Form(
        r".*\.self_attn\.[qk]_norm\.weight",
        "have norms on queries and keys, which this layout has not",
        "Give config.json the class that was trained",
    ),
    Form(
        r".*\.self_attn\.[qkvo]_proj\.bias",
        "hold biases of the attention, which config.json does not state",
        'Set "attention_bias" to true in config.json, if the model was trained with them',
    ),
    Form(
        r".*\.mlp\.(gate|up|down)_proj\.bias",
        "hold biases of the MLP, which config.json does not state",
        'Set "mlp_bias" to true in config.json, if the model was trained with them',
    ),
)
USUAL = (
    "Check config.json (num_hidden_layers, architectures) against the weights, and that every shard is there"
)
HEADLESS = (
    'If the embedding is the head too, set "tie_word_embeddings" to true in config.json; else fetch or save '
    "the checkpoint again with its head"
)
UNBIASED = (
    'If the model was trained without them, name its class in config.json, or set "attention_bias" or '
    '"mlp_bias" to false there; else fetch the shards again'
)
# The keys of config.json that give a dimension of the tables its size.
KEYS = {"v": "vocab_size", "ff": "intermediate_size"}


def quantized_form(dtypes: Mapping[str, str]) -> tuple[str, Form] | None:
    """The first tensor that only a quantized checkpoint has, and its form; `dtypes` are by tensor name."""
    for form in QUANTIZED:
        ending = re.compile(f".*{form.pattern}")
        for name in dtypes:
            if ending.fullmatch(name):
                return name, form
    for name, dtype in dtypes.items():
        if dtype.startswith("f8") and name.endswith(".weight"):
            return name, Form("", "fp8", SOURCE)
    return None


def stated_method(config: Mapping[str, Any]) -> str:
    """The method of a config's quantization_config, also of a nested one; "" where none is stated.

    MLX's states bits and groups alone, under two names.
    """
    stated = next(
        (found for part in _parts(config) for key in KEYS_OF_METHOD if (found := part.get(key))), None
    )
    if not stated:
        return ""
    if not isinstance(stated, dict):
        return "unnamed"
    unnamed = "mlx" if {"bits", "group_size"} <= stated.keys() else "unnamed"
    return str(stated.get("quant_method", unnamed))[:40] or "unnamed"


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a config states of MLX's weights, also a nested one; empty where it states none."""
    for key in reversed(KEYS_OF_METHOD):  # which is the order of mlx-lm
        for part in _parts(config):
            if isinstance(found := part.get(key), dict):
                return found
    return {}


def _parts(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    parts = [config, *(config.get(key) for key in DECODER_KEYS)]
    return [part for part in parts if isinstance(part, Mapping)]


def is_left_over(method: str, dtypes: Mapping[str, str]) -> bool:
    """Whether a stated method says nothing of the weights: all are plain ones, and it has no other effect."""
    plain = all(dtype in PLAIN for dtype in dtypes.values())
    return plain and method not in IN_FORWARD and quantized_form(dtypes) is None


def unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what it says of quantization, which is not the weights' any more."""
    found = {k: v for k, v in config.items() if k not in (*KEYS_OF_METHOD, "compression_config")}
    for key in DECODER_KEYS:
        if isinstance(found.get(key), dict):
            found[key] = unquantized(found[key])
    return found


def unfit(missing: Sequence[str], unknown: Sequence[str], heads: Collection[str]) -> tuple[str, str]:
    """What tensors are that do not fit their table, "" for the usual, and the hint that helps."""
    for form in UNFIT:
        if any(re.fullmatch(form.pattern, name) for name in unknown):
            return form.what, form.hint
    if missing and not unknown and all(name.endswith(".bias") for name in missing):
        return "lack biases that config.json or its class states", UNBIASED
    if len(missing) == 1 and missing[0] in heads and not unknown:
        return "", HEADLESS
    return "", USUAL


def resized(letters: Sequence[str], shape: Sequence[int], asked: Sequence[int]) -> str:
    """The hint on a tensor whose shape config.json does not ask for; `letters` name its dimensions."""
    wrong = [i for i, size in enumerate(asked) if len(shape) == len(asked) and shape[i] != size]
    if len(wrong) == 1 and letters[wrong[0]] in KEYS:
        key = KEYS[letters[wrong[0]]]
        return f'If the weights are the right ones, set "{key}" to {shape[wrong[0]]} in config.json'
    return "config.json and the weights are not of the same model; fetch both again"
