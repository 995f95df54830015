"""One sequence through a whole decoder in memory, with the keys and values of what it has read."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.experts import causal_mask

if TYPE_CHECKING:
    import torch


class Keys:
    """The keys and values of one sequence, by layer, as attention modules ask for them.

    transformers' own cache cuts back in another way from one version to the next.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[torch.Tensor, ...]] = {}
        self._indexed: dict[int, torch.Tensor] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, ...]:
        """Put the new keys and values [1, heads, n, head_dim] behind a layer's; returns all of them."""
        import torch

        new: tuple[torch.Tensor, ...] = (keys, values)
        if layer_idx in self._kept:
            new = tuple(torch.cat(pair, -2) for pair in zip(self._kept[layer_idx], new, strict=True))
        self._kept[layer_idx] = new
        return new

    def update_indexer(self, keys: torch.Tensor, layer_idx: int, *_: object) -> torch.Tensor:
        """Put the new keys [1, n, head_dim] of a layer's indexer behind the others; returns all of them."""
        import torch

        kept = self._indexed.get(layer_idx)
        self._indexed[layer_idx] = keys if kept is None else torch.cat((kept, keys), -2)
        return self._indexed[layer_idx]

    def crop(self, length: int) -> None:
        """Keep the first `length` positions of every layer."""
        self._kept = {layer: tuple(x[..., :length, :] for x in both) for layer, both in self._kept.items()}
        self._indexed = {layer: keys[:, :length] for layer, keys in self._indexed.items()}


class Continued:
    """A decoder with all its blocks loaded, and the keys and values of one sequence.

    A matrix of an expert is read when the first token comes to it, and held from then on.
    """

    def __init__(self, decoder: st.Decoder) -> None:
        self._decoder = decoder
        self._experts: dict[str, torch.Tensor] = {}
        self._blocks = [st.load_block(decoder, index, self._expert) for index in range(decoder.config.layers)]
        self._embedding = st.read(decoder, st.EMBED).to(decoder.dtype)
        tied = decoder.head == st.EMBED
        self._norm = st.read(decoder, st.NORM).to(decoder.dtype)
        self._head = self._embedding if tied else st.read(decoder, decoder.head).to(decoder.dtype)
        self._cache = Keys()
        # transformers 4 calls the argument otherwise.
        names = inspect.signature(self._blocks[0].module.forward).parameters
        self._argument = "past_key_values" if "past_key_values" in names else "past_key_value"

    def forget(self, length: int) -> int:
        """Keep the first `length` positions; how many are kept: all of these."""
        self._cache.crop(length)
        return length

    def read(
        self, part: Sequence[int] | npt.NDArray[Any], at: int, stopped: Callable[[], bool]
    ) -> npt.NDArray[np.float32] | None:
        """Read token ids, or embeddings [n, d], at positions `at`...; the logits [vocab] after the last.

        `stopped` is asked between the blocks: None where it said so, and the piece is forgotten.
        Raises UsageError for ids outside the vocabulary.
        """
        import torch

        decoder = self._decoder
        hidden = self._embedded(part)
        positions = torch.arange(at, at + hidden.shape[1], device=decoder.device)[None]
        settings = {
            "attention_mask": causal_mask(decoder, hidden, at),
            "position_ids": positions,
            "position_embeddings": decoder.rotary(hidden, positions),
            "use_cache": True,
            self._argument: self._cache,
        }
        with torch.no_grad():
            for block in self._blocks:
                if stopped():
                    self.forget(at)
                    return None
                result = block.module(hidden, **settings)
                hidden = result[0] if isinstance(result, tuple) else result
            return st.logits(decoder, self._norm, self._head, hidden[0, -1:])[0].cpu().numpy()

    def _expert(self, name: str) -> torch.Tensor:
        if name not in self._experts:
            self._experts[name] = st.read_as_run(self._decoder, name)
        return self._experts[name]

    def _embedded(self, part: Sequence[int] | npt.NDArray[Any]) -> torch.Tensor:
        import torch

        decoder = self._decoder
        if isinstance(part, np.ndarray) and part.ndim == 2:
            return torch.from_numpy(part).to(decoder.device, decoder.dtype)[None]
        return st.embed(self._embedding, np.array([part], np.int64), decoder.dtype)
