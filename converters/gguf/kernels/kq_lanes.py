"""What the k-quant kernels share: rounding, float16, and sub-blocks laid side by side.

A super-block is 256 values in 8 or 16 sub-blocks of 32 or 16; each sub-block has its own scale, found by a
search that is sequential within the sub-block. LANES sub-blocks are searched side by side: `blocks[part, j,
lane]` holds value j of sub-block `lane`. A vector takes WIDTH neighbouring lanes, and every lane does ggml's
float32 operations in ggml's order; what a search adds up stays in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numpy import float32, int32, uint16, uint32

from converters.gguf.kernels.vectors import WIDTH, as_floats, as_ints, select, store_turned
from dsconvert.compile import inlined

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]

LANES = 64  # sub-blocks searched at once
SUPER = 256  # values in a super-block

ORDER = np.arange(LANES)  # sub-blocks as they follow each other
X, W, LEVEL = 0, 1, 2  # the parts of `blocks`: values, their weights, their levels in the try at hand

ZERO = float32(0)
ONE = float32(1)
INFINITE = float32(np.inf)
NOTHING = float32(1e-15)  # ggml's GROUP_MAX_EPS: a sub-block below it counts as all zero
MAGIC = float32(12582912)  # 1.5 * 2^23: adding it leaves the nearest integer in the low bits


@inlined
def nearest_int(v: Any) -> Any:
    """The integer nearest to float32 `v`, half to even, as int32; from 2^22 on, ggml's wrapped bits."""
    bits = float32(v + MAGIC).view(np.int32)
    return int32(int32(bits & int32(0x007FFFFF)) - int32(0x00400000))


@inlined
def nearest_ints(v: Any) -> Any:
    """The same of a vector."""
    return (as_ints(v + MAGIC) & int32(0x007FFFFF)) - int32(0x00400000)


@inlined
def nearest_levels(v: Any, low: Any, high: Any) -> Any:
    """nearest_ints(v) held within `low` and `high`, all float32.

    Clipped as bits: exact for every `v`, and integer units of the processor are idle in the searches.
    """
    bits = as_ints(v + MAGIC) & int32(0x007FFFFF)
    bits = clip(bits, int32(int32(low) + int32(0x00400000)), int32(int32(high) + int32(0x00400000)))
    return as_floats(bits | int32(0x4B000000)) - MAGIC


@inlined
def nearest_level_of_small(v: Any, low: Any, high: Any) -> Any:
    """The same in fewer steps, for |v| < 2^22 only; of a vector or a number."""
    return clip(v + MAGIC - MAGIC, low, high)


@inlined
def clip(level: Any, low: Any, high: Any) -> Any:
    """`level` held within `low` and `high`."""
    level = select(level > high, high, level)
    return select(level < low, low, level)


@inlined
def half_value(bits: Any) -> Any:
    """The float32 value of the bits of a float16."""
    # Moved 13 bits up a float16 is short of 2^112, subnormals too; the product is exact.
    size = uint32(uint32(uint32(bits) & uint32(0x7FFF)) << uint32(13))
    value = size.view(np.float32) * uint32(0x77800000).view(np.float32)
    special = uint32(size | uint32(0x7F800000)).view(np.float32)
    value = select(size >= uint32(0x0F800000), special, value)
    return select(uint16(bits) >= uint16(0x8000), -value, value)


@inlined
def gather(x: Floats, which: Numbers, blocks: Floats) -> None:
    """Lay the sub-blocks x[which] side by side in blocks[X]; in lanes left over, the last of them."""
    for i in range(0, blocks.shape[2], WIDTH):
        for j in range(0, x.shape[1], WIDTH):
            store_turned(x, which, j, blocks[X], i)
