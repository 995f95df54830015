"""Runs the parts of a block: its attention, and its experts one after the other, each read and dropped.

A dense MLP too large to be held is run as the only expert of a layer without a router: matrix by matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import expand

if TYPE_CHECKING:
    import torch

    from dsconvert.decoder.torch_decoder import Block, Decoder

Names = tuple[str, str, str]  # of an expert's matrices: gate, up, down
Load = Callable[[str], "torch.Tensor"]
Observer = Callable[["torch.Tensor"], "torch.Tensor | None"]
PARTS = ("_gate_exps", "_up_exps", "_down_exps")  # of the stacks' names in a GGUF file
DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")  # module attributes
LARGE = 1 << 28  # values of an MLP that is not held whole: 1 GB in float32
TOKENS_AT_ONCE = 1024


def expert_names(config: ModelConfig) -> tuple[tuple[Names, ...], ...]:
    """The tensors of each expert of each layer, in order; of a layer without experts none."""
    stacks: list[dict[str, tuple[str, ...]]] = [{} for _ in range(config.layers)]
    for spec in expand(find_architecture(config.architecture).table, config):
        for part in PARTS:
            if spec.layer is not None and spec.gguf.endswith(f"{part}.weight"):
                stacks[spec.layer][part] = spec.names
    return tuple(
        tuple(zip(*(stack[part] for part in PARTS), strict=True)) if stack else () for stack in stacks
    )


def large_mlp(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Names | None:
    """The matrices of a dense MLP that is not held whole, from a block's `names` by module attribute."""
    if any(part not in names or part.replace(".weight", ".bias") in names for part in DENSE):
        return None
    gate, up, down = (names[part] for part in DENSE)
    values = sum(math.prod(shapes[name]) for name in (gate, up, down))
    return (gate, up, down) if values > LARGE else None


def streamed(decoder: Decoder) -> Decoder:
    """The same with dense MLPs that are too large to be held as lone experts, which are read as they run."""
    blocks, experts = [], []
    for names, own in zip(decoder.blocks, decoder.experts, strict=True):
        lone = large_mlp(names, decoder.shapes)
        blocks.append({key: name for key, name in names.items() if name not in (lone or ())})
        experts.append((lone,) if lone else own)
    return replace(decoder, blocks=tuple(blocks), experts=tuple(experts))


@dataclass
class StreamedExperts:
    """Stands in for transformers' fused experts of a block: the same sum, one matrix in memory at a time.

    `load` gives a matrix in the decoder's dtype; `observers` are called with the input of a matrix
    by its name, and what they return, if anything, is the input in its stead. `chosen` [tokens, used] are the
    experts that the tokens of the last run went to, in ascending order; None where all went to the only one.
    """

    names: tuple[Names, ...]
    load: Load
    observers: Mapping[str, Observer] = field(default_factory=dict)
    chosen: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """States [tokens, d] through the experts `index` [tokens, used], summed with `weights` as many."""
        import torch

        self.chosen = index.sort(-1).values
        total = torch.zeros_like(hidden)
        for expert in sorted(set(index.flatten().tolist())):
            token, place = torch.where(index == expert)
            part = self._through(self.names[expert], hidden[token]) * weights[token, place, None]
            total.index_add_(0, token, part.to(total.dtype))
        return total

    def alone(self, hidden: torch.Tensor) -> torch.Tensor:
        """States [..., d] through the only expert, which stands in for a dense MLP."""
        (names,) = self.names
        return self._through(names, hidden.reshape(-1, hidden.shape[-1])).view(hidden.shape)

    def _through(self, names: Names, x: torch.Tensor) -> torch.Tensor:
        """States [tokens, d] through one expert."""
        import torch

        gate = self.load(names[0])
        inner = torch.nn.functional.silu(self._seen(names[0], x) @ gate.T, inplace=True)
        del gate
        up = self.load(names[1])
        for start in range(0, len(x), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            inner[rows] *= self._seen(names[1], x[rows]) @ up.T
        del up
        down = self.load(names[2])
        return self._seen(names[2], inner) @ down.T

    def _seen(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The input of a matrix, as its observer leaves it."""
        observe = self.observers.get(name)
        other = None if observe is None else observe(x)
        return x if other is None else other


def attend(decoder: Decoder, block: Block, x: torch.Tensor) -> torch.Tensor:
    """States [batch, length, d] through the attention of a block."""
    return x + attention(decoder, block, x)


def attention(decoder: Decoder, block: Block, x: torch.Tensor) -> torch.Tensor:
    """What the attention of a block adds to states [batch, length, d]."""
    states = block.module.input_layernorm(x)
    result: torch.Tensor = block.module.self_attn(hidden_states=states, **arguments(decoder, x))[0]
    return result


def arguments(decoder: Decoder, x: torch.Tensor) -> dict[str, Any]:
    """What attention is given beside states [batch, length, d]: the mask and the positions."""
    import torch

    positions = torch.arange(x.shape[1], device=x.device)[None]
    return {
        "attention_mask": causal_mask(decoder, x),
        "position_ids": positions,
        "position_embeddings": decoder.rotary(x, positions),
    }


def causal_mask(decoder: Decoder, x: torch.Tensor, before: int = 0) -> torch.Tensor | None:
    """What states [batch, length, d] may look at, `before` positions read earlier: bool [1, 1, length, all].

    None asks sdpa for its causal kernel, where nothing else reads a mask; an indexer does.
    """
    import torch

    length, latent = x.shape[1], decoder.config.latent
    if (latent is None or latent.indexer is None) and (before == 0 or length == 1):
        return None
    seen = torch.ones((length, before + length), dtype=torch.bool, device=x.device)
    return seen.tril(before)[None, None]
