"""Plain rounding to nearest in a GPTQ file's own settings: what error feedback is to be better than."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from converters.gptq.pack import Packed, zero_points
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.plain_rounding import nearest_on_grid

Floats = npt.NDArray[np.float32]


def nearest(rows: Floats, packed: Packed, bits: int, checkpoint_format: str, start: int = 0) -> Floats:
    """Outputs `start` and following of a linear, float32 [n, K], rounded as the tensor `packed` holds it.

    Its bits, its groups of inputs, whether it is symmetric (all zero points in the middle) and whether its
    ranges were searched for the least error are read from the tensor; the range of each group is found from
    the weights as they are. float32 [n, K].
    """
    zeros = zero_points(packed, bits, checkpoint_format)
    scheme = Scheme(bits, -1, bool((zeros == 1 << (bits - 1)).all()))
    scales = packed.scales[:, start : start + len(rows)].astype(np.float32)
    return nearest_on_grid(rows, scales, packed.g_idx, scheme)
