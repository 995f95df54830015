"""What dsconvert knows of an architecture: one of these, and one file in `architectures/`, for each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import CheckpointError
from dsconvert.models.experts import Experts, Latent
from dsconvert.models.tensor_table import SOLVE_ORDER, Role, Row, Table, renamed
from dsconvert.models.values import UNSET, Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

Keys = dict[str, tuple[str, Any]]
Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class TorchClasses:
    """transformers' own classes of a decoder: its config, layer, RoPE and norm."""

    config: Any
    layer: Any
    rotary: Any
    norm: Any


@dataclass(frozen=True)
class Mount:
    """Where a bigger model keeps its decoder: the key of config.json, and the name of the decoder's tensor.

    With `tied_outside` the whole model's config says whether the head is the embedding, by default it is.
    `also` are other model types that the decoder's part may state; a `nameless` one states no class.
    """

    decoder: Architecture
    key: str
    inside: Callable[[str], str]
    tied_outside: bool
    also: tuple[str, ...] = ()
    nameless: bool = False


@dataclass(frozen=True)
class Architecture:
    """An architecture, found by its Hugging Face class or by the name that its GGUF files state.

    `words` is a pattern of other names for the class, case aside. `defaults` are what transformers' config
    class takes for absent keys; a flag that is not among them is not read by the class. `nulls` are keys of
    which null says something else than that. `check` raises CheckpointError for a config that says more than
    the table can. `gguf_keys` come without the prefix, `derived` are the float32 tensors that a GGUF file
    needs and no checkpoint holds. `torch_classes` imports transformers, `numpy_block` says whether the
    decoder's numpy block computes the same. `groups` are the linears in the order in which they are solved.
    `wide_values` says whether the model has the shape for which llama-quantize raises the bits of attn_v.
    `latent` and `experts` read config.json for these parts of a model, None where it has none; `library_keys`
    are the keys of transformers' config class for them, `attributes` says what its layer calls a tensor that
    has another name on disk. `gguf_notes` are what the user of a GGUF file should know, `runtime_experts`
    what the runtime takes of experts whatever a file says. `stored_as` says by the keys and tensors of a GGUF
    file whether it is of this class, where several have one name there. `mlx` says whether mlx-lm takes
    quantized tensors under the names that the checkpoint has, experts each on its own. `mount` is set for a
    decoder inside a bigger model, `beside` are the tables that its other parts may have.
    """

    hf_class: str
    model_type: str
    gguf: str
    table: Table
    defaults: Mapping[str, Any]
    check: Callable[[Values], None]
    torch_classes: Callable[[], TorchClasses]
    gguf_keys: Callable[[ModelConfig], Keys]
    words: str = ""
    nulls: tuple[str, ...] = ()
    derived: Callable[[ModelConfig], Tensors] = lambda config: {}
    wide_values: Callable[[ModelConfig], bool] = lambda config: False
    latent: Callable[[Values], Latent | None] = lambda get: None
    experts: Callable[[Values], Experts | None] = lambda get: None
    library_keys: Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}
    runtime_experts: Mapping[str, Any] = field(default_factory=dict)
    attributes: Callable[[str], str] = lambda name: name
    gguf_notes: Callable[[ModelConfig], tuple[str, ...]] = lambda config: ()
    stored_as: Callable[[Mapping[str, Any], Collection[str]], bool] | None = None
    numpy_block: bool = True
    mlx: bool = False
    groups: tuple[Role, ...] = SOLVE_ORDER
    mount: Mount | None = None
    beside: tuple[tuple[Row, ...], ...] = ()

    @property
    def decoder(self) -> Architecture:
        """The architecture of the decoder alone."""
        return self.mount.decoder if self.mount else self


def mounted(
    decoder: Architecture,
    hf_class: str,
    model_type: str,
    mount: Mount,
    *,
    words: str = "",
    drop: tuple[str, ...] = (),
    beside: tuple[tuple[Row, ...], ...] = (),
) -> Architecture:
    """A bigger model with this decoder; `drop` are patterns of its other parts' tensors."""
    table = Table(renamed(decoder.table.rows, mount.inside), (*decoder.table.drop, *drop))
    return replace(
        decoder,
        hf_class=hf_class,
        model_type=model_type,
        words=words,
        table=table,
        mount=mount,
        beside=beside,
    )


def unwritable(what: str, why: str) -> CheckpointError:
    """The error of a config that no GGUF file can state."""
    return CheckpointError(
        f"{what} cannot be written",
        where="config.json",
        why=why,
        hint="The model runs in transformers as it is; no GGUF file of it would be the same model",
    )


def usual_keys(config: ModelConfig) -> Keys:
    """The keys of a GGUF file that llama.cpp reads of every decoder."""
    return {
        "block_count": ("uint32", config.layers),
        "context_length": ("uint32", config.context_length),
        "embedding_length": ("uint32", config.hidden_size),
        "feed_forward_length": ("uint32", config.intermediate_size),
        "attention.head_count": ("uint32", config.heads),
        "attention.head_count_kv": ("uint32", config.kv_heads),
        "attention.layer_norm_rms_epsilon": ("float32", config.norm_eps),
        "rope.freq_base": ("float32", config.rope_theta),
    }


def head_keys(config: ModelConfig) -> Keys:
    """The keys on a head's size where config.json states one."""
    sizes = ("attention.key_length", "attention.value_length") if config.explicit_head_dim else ()
    return dict.fromkeys(sizes, ("uint32", config.head_dim))


def check_full_attention(get: Values, window: str = "sliding_window") -> None:
    """See that every position attends to all before it; `window` is the key of a window, "" for none.

    Raises CheckpointError that names the key.
    """
    context = get.size("max_position_embeddings")
    for key in filter(None, (window, "attention_chunk_size")):
        value = get.raw.get(key, get.defaults.get(key))
        if value is not None and get.over({key: value}).size(key) < context:
            raise get.wrong(key, f"is {value}, and this layout attends to all of {context} tokens", UNSET)
    types = get.raw.get("layer_types")
    if types is not None and (not isinstance(types, list) or any(kind != "full_attention" for kind in types)):
        raise get.wrong("layer_types", "names other layers than full_attention, the only ones of this layout")
    if get.raw.get("is_causal", True) is not True:
        raise get.wrong("is_causal", "is not true, and this layout attends to what came before only")
    if get.raw.get("per_layer_config") is not None:
        raise get.wrong("per_layer_config", "gives layers numbers of their own, and here they share theirs")
