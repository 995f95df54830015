"""The importance matrix: how strongly each input of each linear is active on calibration text.

In llama.cpp's terms: for every linear, the sum over all tokens of its inputs' squares, and how many tokens
there were. It is the diagonal of the GPTQ Hessian, so one capture serves both.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Event, Step
from dsconvert.models.architectures import find_architecture
from dsconvert.models.tensor_table import expand


@dataclass(frozen=True, eq=False)
class Importance:
    """`sums` are float32 [K] by Hugging Face name of the weight; `rows` is how many tokens were summed."""

    sums: dict[str, npt.NDArray[np.float32]]
    rows: int


def measure_importance(decoder: st.Decoder, windows: st.IntArray) -> Generator[Event, None, Importance]:
    """Run the windows [n, length] through the decoder and sum the squares of every linear's inputs.

    Raises QuantizationError for inputs that are not finite, UsageError for ids outside the vocabulary.
    """
    hidden = linear_inputs.embed(decoder, windows)
    sums: dict[str, npt.NDArray[np.float32]] = {}
    for index in range(decoder.config.layers):
        yield Step(f"block {index + 1} of {decoder.config.layers}")
        block = st.load_block(decoder, index)
        for group in linear_inputs.walk(decoder, block, hidden, diagonal=True):
            # moment = 2/rows * sum of squares
            total = (group.moment.double() * (group.rows / 2)).cpu().numpy().astype(np.float32)
            sums |= dict.fromkeys(group.names, total)
    return Importance(sums, int(windows.size))


def tensors(importance: Importance, decoder: st.Decoder) -> dict[str, npt.NDArray[np.float32]]:
    """The tensors of llama.cpp's imatrix file, by name, rows first.

    NAME.in_sum2 float32 [1, K] and NAME.counts float32 [1, 1], in the order of the names
    (tools/imatrix/imatrix.cpp, save_imatrix); NAME is the weight's in a GGUF model.
    """
    named = {
        spec.hf: spec.gguf
        for spec in expand(find_architecture(decoder.config.architecture).table, decoder.config)
    }
    found: dict[str, npt.NDArray[np.float32]] = {}
    for gguf, hf in sorted((named[hf], hf) for hf in importance.sums):
        found[f"{gguf}.in_sum2"] = importance.sums[hf][None]
        found[f"{gguf}.counts"] = np.array([[importance.rows]], np.float32)
    return found
