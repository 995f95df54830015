"""Windows of tokens, and which of their predictions are scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsconvert.errors import UsageError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Windows:
    """`tokens` int64 [n, length]; window i is scored on the predictions made at `first[i]` ... length - 2."""

    tokens: IntArray
    first: IntArray

    @property
    def length(self) -> int:
        """Tokens per window."""
        return int(self.tokens.shape[1])

    @property
    def scored(self) -> int:
        """How many predictions are scored in all."""
        return int((self.length - 1 - self.first).sum())

    def targets(self, window: int, rows: slice) -> IntArray:
        """The tokens that follow these positions."""
        targets: IntArray = self.tokens[window, rows.start + 1 : rows.stop + 1]
        return targets

    def places(self, window: int, rows: slice) -> dict[str, IntArray]:
        """Columns for these positions' predictions: window, position, target."""
        position = np.arange(rows.start, rows.stop)
        target = self.targets(window, rows)
        return {"window": np.full_like(position, window), "position": position, "target": target}

    def all_places(self) -> dict[str, IntArray]:
        """The columns of `places` for every scored prediction, in order."""
        parts = [
            self.places(window, slice(first, self.length - 1))
            for window, first in enumerate(self.first.tolist())
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def whole(tokens: IntArray) -> Windows:
    """Score every prediction of every window."""
    return Windows(tokens, np.zeros(len(tokens), np.int64))


def consecutive(ids: IntArray, length: int, bos: int | None = None) -> Windows:
    """llama.cpp's way: windows end to end, each scored on its second half; what is left over is dropped.

    With `bos` it replaces the first token of each window, as llama.cpp does.
    Raises UsageError when there are fewer than `length` ids.
    """
    tokens = _cut(ids, length, length, bos)
    return Windows(tokens, np.full(len(tokens), length // 2, np.int64))


def strided(ids: IntArray, length: int, stride: int, bos: int | None = None) -> Windows:
    """The strided way (2048/512): each window is scored on what the one before did not, the first on all.

    Raises UsageError when there are fewer than `length` ids, or the stride is not 1 ... length.
    """
    tokens = _cut(ids, length, stride, bos)
    first = np.full(len(tokens), max(length - stride - 1, 0), np.int64)
    first[0] = 0
    return Windows(tokens, first)


def _cut(ids: IntArray, length: int, stride: int, bos: int | None) -> IntArray:
    if length < 2 or not 1 <= stride <= length:
        raise UsageError(f"windows of {length} tokens, {stride} apart, make no sense")
    if ids.ndim != 1 or len(ids) < length:
        raise UsageError(
            f"the text has {ids.size} tokens, one window needs {length}",
            hint="Give a longer text or shorter windows",
        )
    tokens = np.lib.stride_tricks.sliding_window_view(ids, length)[::stride].astype(np.int64)
    if bos is not None:
        tokens[:, 0] = bos
    return tokens
