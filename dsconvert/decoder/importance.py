"""The importance matrix: how strongly each input of each linear is active on calibration text.

In llama.cpp's terms: for every linear, the sum over all tokens of its inputs' squares, and how many tokens
there were. It is the diagonal of the GPTQ Hessian, so one capture serves both.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.expert_inputs import observe
from dsconvert.events import Event, Step
from dsconvert.models.architectures import find_architecture
from dsconvert.models.tensor_table import Spec, plan

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Importance:
    """`sums` and `counts` by GGUF name: float32 [matrices, K], how many tokens were summed [matrices].

    A tensor is one matrix, or as many as are stacked in it.
    """

    sums: dict[str, npt.NDArray[np.float32]]
    counts: dict[str, npt.NDArray[np.float32]]


def measure_importance(decoder: st.Decoder, windows: st.IntArray) -> Generator[Event, None, Importance]:
    """Run the windows [n, length] through the decoder and sum the squares of every linear's inputs.

    Raises QuantizationError for inputs that are not finite, UsageError for ids outside the vocabulary.
    """
    hidden = linear_inputs.embed(decoder, windows)
    found = Importance({}, {})
    table = find_architecture(decoder.config.architecture).table
    specs = plan(table, decoder.config, decoder.source.shapes())
    plain = decoder.config.experts is None and decoder.config.latent is None
    for index in range(decoder.config.layers):
        yield Step(f"block {index + 1} of {decoder.config.layers}")
        block = st.load_block(decoder, index)
        own = [spec for spec in specs if spec.layer == index]
        if plain:
            _walked(decoder, block, hidden, own, found)
        else:
            hidden = observe(decoder, block, hidden, own, found.sums, found.counts)
    return found


def _walked(
    decoder: st.Decoder, block: st.Block, hidden: torch.Tensor, specs: list[Spec], found: Importance
) -> None:
    """Take the states through a dense block, in place, and note the inputs of its linears."""
    named = {spec.hf: spec.gguf for spec in specs}
    for group in block_walk.walk(decoder, block, hidden, diagonal=True, fixed=True):
        # moment = 2/rows * sum of squares
        total = (group.moment.double() * (group.rows / 2)).cpu().numpy().astype(np.float32)
        for name in group.names:
            found.sums[named[name]] = total[None]
            found.counts[named[name]] = np.array([group.rows], np.float32)


def tensors(importance: Importance) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of llama.cpp's imatrix file, by name, rows first.

    NAME.in_sum2 float32 [matrices, K] and NAME.counts float32 [matrices, 1], in the order of the names
    (tools/imatrix/imatrix.cpp, save_imatrix); NAME is the weight's in a GGUF model.
    """
    found: dict[str, npt.NDArray[np.float32]] = {}
    for name in sorted(importance.sums):
        found[f"{name}.in_sum2"] = importance.sums[name]
        found[f"{name}.counts"] = importance.counts[name][:, None]
    return found
