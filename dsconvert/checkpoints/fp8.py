"""Reads matrices stored as fp8 with a scale for each block: DeepSeek-V3, R1 and their like.

NAME is float8 e4m3 (sign, 4 bits of exponent, 3 of mantissa, no infinity), NAME_scale_inv holds what each
block is multiplied by, in float32 or as a power of two (e8m0). The last blocks of rows and columns may be
smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.errors import CheckpointError, PlanError, quoted
from dsconvert.models.weights import widened

NAME = "fp8"  # the stored type of what is read here, for tables and messages
SCALES = "_scale_inv"
BLOCK = (128, 128)
KEPT = 64  # matrices whose scales stay in memory: 14 MB of DeepSeek-V3's largest
KEY, METHOD = "quantization_config", "fp8"
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


def decoded(tensors: Mapping[str, Stored], config: Mapping[str, Any], where: object) -> dict[str, Stored]:
    """The tensors, each pair of a matrix in fp8 and its scales as one whose rows are float32.

    `config` is config.json, read from `where`: its quantization_config says how large blocks are. What is no
    such pair stays as it is. Raises CheckpointError for a size that is none, PlanError for scales that do not
    fit their matrix.
    """
    pairs = {
        name: tensors[name + SCALES]
        for name, stored in tensors.items()
        if stored.dtype == "f8_e4m3" and name + SCALES in tensors and stored.offset is not None
    }
    if not pairs:
        return dict(tensors)
    block = _block(config, where)
    scales = lru_cache(KEPT)(
        lambda name: scale_values(pairs[name])
    )  # chunks of a matrix come one after the other
    found = {}
    for name, stored in tensors.items():
        if name in pairs:
            found[name] = _joined(name, stored, pairs[name], block, scales)
        elif not name.endswith(SCALES) or name.removesuffix(SCALES) not in pairs:
            found[name] = stored
    return found


def _block(config: Mapping[str, Any], where: object) -> tuple[int, int]:
    """Rows and columns of a block."""
    stated = config.get(KEY)
    size = stated.get("weight_block_size", list(BLOCK)) if isinstance(stated, dict) else list(BLOCK)
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise CheckpointError(
            "'weight_block_size' cannot be used",
            where=where,
            why=f"it is {quoted(size)}, should be two positive whole numbers",
            hint="Fetch config.json again from where the checkpoint came from",
        )
    return size[0], size[1]


def _joined(
    name: str, stored: Stored, scales: Stored, block: tuple[int, int], read: Callable[[str], Floats]
) -> Stored:
    """A matrix and its scales, which `read` gives, as one tensor."""
    grid = tuple(-(-size // step) for size, step in zip(stored.shape, block, strict=False))
    if len(stored.shape) != 2 or scales.shape != grid:
        raise PlanError(
            f"has scales of shape {list(scales.shape)}, its shape {list(stored.shape)} asks for {list(grid)}",
            where=name,
            why=f"There is one for each block of {block[0]} by {block[1]} values",
            hint="Weights and scales are not of the same model; fetch both again",
        )
    if scales.dtype != "f8_e8m0" and not scales.readable:
        raise CheckpointError(
            f"the scales of {quoted(name)} are stored as {scales.dtype}, which is not converted",
            where=scales.path,
            why="They are read from f32, bf16, f16 and f8_e8m0",
        )
    columns = stored.shape[1]

    def decode(start: int, stop: int) -> Floats:
        values = VALUES[_codes(stored, start, stop)]
        for line in range(start // block[0], -(-stop // block[0])):
            rows = slice(max(line * block[0] - start, 0), (line + 1) * block[0] - start)
            values[rows] *= np.repeat(read(name)[line], block[1])[:columns]
        return values

    nbytes = stored.nbytes + scales.nbytes
    return replace(
        stored,
        dtype=NAME,
        nbytes=nbytes,
        offset=None,
        data=None,
        fetch=None,
        decode=decode,
        parts=(stored, scales),
    )


def _codes(stored: Stored, start: int, stop: int) -> Bytes:
    """Rows of a matrix of one byte to a value."""
    columns, stop = stored.shape[1], min(stop, stored.shape[0])
    return np.frombuffer(stored.raw(start * columns, stop * columns), np.uint8).reshape(-1, columns)


def scale_values(scales: Stored) -> Floats:
    """All scales of a matrix in float32."""
    if scales.dtype != "f8_e8m0":
        return widened(scales.rows(0, scales.shape[0]))
    return POWERS[_codes(scales, 0, scales.shape[0])]


def _e4m3() -> Floats:
    """The value of each byte: 1.mmm times 2^(e - 7), 0.mmm times 2^-6 for e = 0; all ones are no number."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    size[(code & 127) == 127] = np.nan
    return np.where(code < 128, size, -size).astype(np.float32)


def _e8m0() -> Floats:
    """The value of each byte: 2^(e - 127), the last one no number."""
    found = 2.0 ** (np.arange(256) - 127)
    found[255] = np.nan
    return found.astype(np.float32)


VALUES, POWERS = _e4m3(), _e8m0()
