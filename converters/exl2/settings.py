"""How a linear's inputs are shared out to bit widths: groups of rows, what they cost, and the candidates.

Rows stand in order of activity, the most active first: they get the widest codes. The candidates are a
ladder per kind of linear; which rung a linear stands on is the allocation's choice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dsconvert.errors import UsageError

BITS = (8, 6, 5, 4, 3, 2)  # in the order in which a file has them
GROUP_SIZES = (32, 64, 128)
COLUMNS = 32  # outputs are padded to a multiple of it


class Group(NamedTuple):
    """Rows that share a width, and per column a scale."""

    bits: int
    rows: int


@dataclass(frozen=True)
class Setting:
    """Widths from the widest down: each takes `percent` of the rows, in groups of `sizes` rows."""

    bits: tuple[int, ...]
    percent: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def text(self) -> str:
        """A name of its own, as measurements and reports have it: "5b10%g128+4b90%g128"."""
        parts = zip(self.bits, self.percent, self.sizes, strict=True)
        return "+".join(f"{bits}b{percent}%g{size}" for bits, percent, size in parts)


def named(text: str) -> Setting:
    """The setting of this name; raises UsageError for what names none."""
    parts = [re.fullmatch(r"(\d)b(\d+)%g(\d+)", part) for part in text.split("+")]
    numbers = [tuple(map(int, part.groups())) for part in parts if part]
    if len(numbers) < len(parts):
        raise UsageError(
            f"is not an EXL2 setting: {text[:80]!r}", hint='They are of the form "5b10%g128+4b90%g128"'
        )
    bits, percent, sizes = zip(*numbers, strict=True)
    setting = Setting(bits, percent, sizes)
    _check(setting)
    return setting


def groups_for(inputs: int, setting: Setting) -> tuple[Group, ...]:
    """The groups of `inputs` rows, a multiple of 32: every width gets whole groups, the last the rest.

    ceil(min(inputs * share, rows left) / size) groups of each width, as exllamav2's own quantizer has them;
    only the last group may be short. Raises UsageError for a setting that EXL2 does not have.
    """
    _check(setting)
    groups: list[Group] = []
    left = inputs
    for bits, percent, size in zip(setting.bits, setting.percent, setting.sizes, strict=True):
        count = -(-min(inputs * percent, 100 * left) // (100 * size))
        rows = [min(size, left - i * size) for i in range(count)]
        groups += [Group(bits, n) for n in rows]
        left -= sum(rows)
    return tuple(groups)


def bits_of(inputs: int, outputs: int, groups: Iterable[Group], bias: bool = False) -> int:
    """Bits that a linear takes in the file: codes, scales, groups, permutation, and padding of each."""
    columns, count, total = padded(outputs), 0, inputs * 32
    for group in groups:
        count += 1
        total += group.bits * group.rows * columns
    return total + count * (16 + 32 + 4 * columns) + (16 * columns if bias else 0)


def padded(outputs: int) -> int:
    """Columns that `outputs` take in the file."""
    return -(-outputs // COLUMNS) * COLUMNS


def settings_for(role: str, inputs: int) -> tuple[Setting, ...]:
    """The candidates for a linear of `role` ("qkv", "o", "gate_up", "down") that differ at `inputs` rows."""
    distinct = {groups_for(inputs, setting): setting for setting in reversed(SETTINGS[role])}
    return tuple(reversed(distinct.values()))


def _check(setting: Setting) -> None:
    bits = setting.bits
    falling = list(bits) == sorted(set(bits), reverse=True)
    known = bits and set(bits) <= set(BITS) and set(setting.sizes) <= set(GROUP_SIZES)
    shares = min(setting.percent, default=0) > 0 and sum(setting.percent) == 100
    if not known or not falling or not shares or not len(bits) == len(setting.percent) == len(setting.sizes):
        raise UsageError(
            f"is not an EXL2 setting: {setting.text or 'nothing'}",
            hint=f"Widths of {', '.join(map(str, BITS))} bits from the widest down, 100 percent in all, "
            f"groups of {', '.join(map(str, GROUP_SIZES))}",
        )


def _mix(bits: tuple[int, ...], percent: tuple[int, ...], *sizes: int) -> Setting:
    return Setting(bits, percent, sizes if len(sizes) > 1 else sizes * len(bits))


# About 2.1, 2.2, 2.4, 2.6, 3.1 ... 8 bits per weight. Mixed widths spend on the active rows first; between
# them, smaller groups buy the same error for less than the next width does.
ATTENTION = (
    _mix((3, 2), (5, 95), 64),
    _mix((3, 2), (15, 85), 64),
    _mix((3, 2), (30, 70), 64),
    _mix((4, 3, 2), (5, 45, 50), 64),
    _mix((4, 3), (5, 95), 128),
    _mix((4, 3), (10, 90), 64),
    _mix((4, 3), (25, 75), 64),
    _mix((5, 4, 3), (5, 45, 50), 64),
    _mix((4,), (100,), 128),
    _mix((5, 4), (5, 95), 64),
    _mix((5, 4), (10, 90), 32),
    _mix((5, 4), (30, 70), 64),
    _mix((6, 5, 4), (5, 45, 50), 64),
    _mix((6, 5), (5, 95), 128),
    _mix((6, 5), (15, 85), 32),
    _mix((6, 5), (50, 50), 64),
    _mix((6,), (100,), 64),
    _mix((8, 6), (20, 80), 64),
    _mix((8,), (100,), 128),
)
GATE_UP = (
    _mix((3, 2), (5, 95), 64),
    _mix((3, 2), (15, 85), 64),
    _mix((3, 2), (30, 70), 64),
    _mix((4, 3, 2), (5, 45, 50), 64),
    _mix((4, 3), (5, 95), 128),
    _mix((4, 3), (15, 85), 64),
    _mix((4, 3), (30, 70), 32),
    _mix((5, 4, 3), (5, 45, 50), 64),
    _mix((4,), (100,), 128),
    _mix((5, 4), (10, 90), 64),
    _mix((5, 4), (25, 75), 32),
    _mix((6, 5, 4), (5, 45, 50), 64),
    _mix((6, 5), (10, 90), 128),
    _mix((6, 5), (25, 75), 32),
    _mix((6,), (100,), 128),
    _mix((8, 6), (20, 80), 64),
    _mix((8,), (100,), 128),
)
# The inputs of the down projection are the most uneven: a few of them carry most of its output.
DOWN = (
    _mix((4, 3, 2), (5, 10, 85), 32, 64, 64),
    _mix((6, 3, 2), (5, 20, 75), 32, 64, 64),
    _mix((6, 4, 3, 2), (5, 10, 30, 55), 32, 64, 64, 64),
    _mix((6, 3), (5, 95), 32, 128),
    _mix((8, 4, 3), (5, 10, 85), 32, 128, 128),
    _mix((8, 4, 3), (5, 25, 70), 32, 64, 64),
    _mix((8, 5, 4, 3), (5, 10, 35, 50), 32, 64, 64, 64),
    _mix((6, 4), (5, 95), 32, 128),
    _mix((8, 4), (5, 95), 32, 128),
    _mix((8, 5, 4), (5, 15, 80), 32, 64, 64),
    _mix((8, 6, 5, 4), (5, 10, 35, 50), 32, 64, 64, 64),
    _mix((6, 5), (5, 95), 32, 128),
    _mix((8, 6, 5), (5, 15, 80), 32, 64, 64),
    _mix((8, 6, 5), (5, 45, 50), 32, 64, 64),
    _mix((8, 6), (5, 95), 32, 128),
    _mix((8, 6), (25, 75), 64),
    _mix((8,), (100,), 128),
)
SETTINGS: Mapping[str, tuple[Setting, ...]] = {
    "qkv": ATTENTION,
    "o": ATTENTION,
    "gate_up": GATE_UP,
    "down": DOWN,
}
# The head by its nominal bits: 2.8, 3.3, 4.4, 5.2, 6.3 and 8 bits per weight.
HEADS: Mapping[int, Setting] = {
    2: _mix((4, 2), (30, 70), 32),
    3: _mix((4, 3), (15, 85), 32),
    4: _mix((6, 4), (15, 85), 32),
    5: _mix((6, 5), (15, 85), 128),
    6: _mix((8, 6), (15, 85), 128),
    8: _mix((8,), (100,), 128),
}
