"""Builds transformers' own config object from config.json; the torch decoder runs by it, unchanged."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from dsconvert.decoder.numpy_config import Numbers, Unread, numbers, stored_rope
from dsconvert.errors import CheckpointError, short
from dsconvert.models.architecture import TorchClasses
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

# Of config.json what says nothing of a decoder's arithmetic, and is checked or looked up by transformers.
NOT_ARITHMETIC = (
    "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "quantization_config",
    "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "_name_or_path",
    "tie_word_embeddings", "use_cache", "attn_implementation", "_attn_implementation",
)  # fmt: skip
# What transformers' own config says besides that changes no prediction; RoPE's angles are compared as such.
INERT = (*NOT_ARITHMETIC, "initializer_range", "attention_dropout", "pretraining_tp", "rope_theta",
         "num_nextn_predict_layers", "output_router_logits", "rope_scaling", "rope_parameters")  # fmt: skip


def library_config(config: ModelConfig) -> Any:
    """The config of transformers' own class, of config.json as it is, or of the keys of a file that has none.

    The latter is without RoPE scaling. Raises CheckpointError when transformers refuses the numbers.
    """
    import transformers

    stated = config.decoder or {**config.library_keys, "rope_theta": config.rope_theta}
    nulls = find_architecture(config.architecture).nulls
    keys = {k: v for k, v in stated.items() if k not in NOT_ARITHMETIC and (v is not None or k in nulls)}
    if int(transformers.__version__.split(".")[0]) < 5:
        keys = _old_spelling(keys)
    classes = torch_classes(config)
    try:
        # A copy, since it changes the RoPE settings in place.
        library = classes.config(**copy.deepcopy(keys))
    except Exception as error:  # its validation raises classes of its own
        raise CheckpointError("transformers refuses this config", why=short(error)) from None
    library._attn_implementation = "sdpa"
    return library


def torch_classes(config: ModelConfig) -> TorchClasses:
    """transformers' classes of the config's decoder."""
    return find_architecture(config.architecture).torch_classes()


def _old_spelling(keys: dict[str, Any]) -> dict[str, Any]:
    """The same RoPE for transformers 4, whose settings lie elsewhere: it has no rope_parameters."""
    said = dict(keys.get("rope_scaling") or keys.get("rope_parameters") or {})
    theta = said.pop("rope_theta", keys.get("rope_theta"))
    kind = said.get("rope_type", said.get("type", "default"))
    outside = keys.get("original_max_position_embeddings")
    if outside is not None and kind != "default":
        said["original_max_position_embeddings"] = outside
    rest = {k: v for k, v in keys.items() if k not in ("rope_theta", "rope_parameters")}
    rest["rope_scaling"] = None if kind == "default" else said
    return rest if theta is None else {**rest, "rope_theta": theta}


def open_rotary(config: ModelConfig, library: Any, device: torch.device | str) -> Any:
    """transformers' RoPE of its config; for a GGUF file with the angles that llama.cpp would take.

    Raises CheckpointError when transformers has no rule for it.
    """
    import torch

    if not config.decoder:
        library = unscaled_library(config, library)
    try:
        rotary = torch_classes(config).rotary(config=library).to(device)  # inv_freq stays float32
    except Exception as error:  # whatever its rules meet in a config
        raise CheckpointError("transformers has no RoPE for this config", why=short(error)) from None
    if not config.decoder:
        divisors, rotary.attention_scaling = stored_rope(config)
        rotary.inv_freq /= torch.from_numpy(divisors).to(device)
    return rotary


def same_arithmetic(one: Any, rotary: Any, other: Any, other_rotary: Any) -> bool:
    """Whether two of transformers' configs, each with its RoPE, make the same decoder of the same weights.

    Floats are those of float32: a file that is not config.json has no others.
    """
    import torch

    said, others = ({k: v for k, v in c.to_dict().items() if k not in INERT} for c in (one, other))
    if said.keys() != others.keys():
        return False
    for key, value in said.items():
        floats = isinstance(value, float) and isinstance(others[key], float)
        if np.float32(value) != np.float32(others[key]) if floats else value != others[key]:
            return False
    same = rotary.attention_scaling == other_rotary.attention_scaling
    return same and torch.equal(rotary.inv_freq, other_rotary.inv_freq)


def unscaled_library(config: ModelConfig, library: Any) -> Any:
    """transformers' config without RoPE scaling."""
    plain = copy.copy(library)
    if hasattr(library, "rope_parameters"):
        plain.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    else:
        plain.rope_scaling = None
    return plain


def numbers_of(config: ModelConfig, library: Any, rotary: Any) -> Numbers:
    """The numbers of a model as transformers has them; `library` and `rotary` are of this config."""
    import torch

    rope = getattr(library, "rope_parameters", None)  # new with transformers 5
    rope = rope or {"rope_theta": library.rope_theta, **(library.rope_scaling or {})}
    with torch.device("meta"):
        attention = torch_classes(config).layer(library, 0).self_attn
    return Numbers(
        heads=library.num_attention_heads,
        kv_heads=library.num_key_value_heads,
        head_dim=getattr(library, "head_dim", None) or library.hidden_size // library.num_attention_heads,
        context_length=library.max_position_embeddings,
        norm_eps=library.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope=str(rope if config.decoder else config.rope_scaling or "default"),
        angles=rotary.inv_freq.cpu().numpy(),
        scale=float(rotary.attention_scaling),
        softmax=float(attention.scaling),
        experts=config.experts,
        indexer=config.latent.indexer if config.latent else None,
    )


def read_numbers(config: ModelConfig) -> Numbers:
    """The numbers of a model: transformers is asked, and loaded, only where numpy's reading does not do."""
    try:
        return numbers(config)
    except Unread:
        library = library_config(config)
        return numbers_of(config, library, open_rotary(config, library, "cpu"))
