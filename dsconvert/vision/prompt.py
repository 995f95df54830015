"""A prompt with pictures through a decoder: embeddings stand where the image tokens would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsconvert.decoder import torch_decoder as st
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource

if TYPE_CHECKING:
    import torch

Floats = npt.NDArray[np.float32]
Part = Sequence[int] | Floats


def prompt_logits(source: WeightSource, config: ModelConfig, parts: Sequence[Part]) -> torch.Tensor:
    """Next-token logits, float32 [n, vocab] on the CPU, after every position of one sequence.

    Each part is token ids, or embeddings (float32 [n, d]) in their place. Block by block, as `compare` runs a
    model; raises what opening the decoder raises, and UsageError for an id outside the vocabulary.
    """
    import torch

    decoder = st.open_decoder(source, config, st.pick_device("cpu"), torch.float32)
    hidden = torch.cat([_embedded(decoder, part) for part in parts])[None]
    for index in range(config.layers):
        hidden = st.run_block(decoder, st.load_block(decoder, index), hidden)
    norm, head = st.head_weights(decoder)
    return st.logits(decoder, norm, head, hidden[0])


def _embedded(decoder: st.Decoder, part: Part) -> torch.Tensor:
    import torch

    if isinstance(part, np.ndarray):
        return torch.from_numpy(part)
    ids = np.array([part], np.int64)
    return st.embed(st.read(decoder, st.EMBED), ids, decoder.dtype)[0]


def divergence(base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """KL divergence in nats of each row of logits, float64 [n]."""
    p, q = base.double().log_softmax(-1), candidate.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
