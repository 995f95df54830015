"""Which setting each part of a model gets: the least total error that a budget of bits can buy.

A multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, ch. 11). The steps of the options' convex
hulls, steepest first, give a good choice and a price per bit. Lagrange's bound at that price says what any
other choice must cost at the least; options that cannot pay are dropped, and what is left is searched
exactly, by dynamic programming over choices that no other beats in both bits and error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dsconvert.errors import QuantizationError, UsageError

STATES = 2048  # partial choices kept; more of them are thinned out evenly by bits
ROUNDING = 1e-12  # of an error: what sums in another order may differ by


class Option(NamedTuple):
    """What a slot may get: its bits in the file and its error, in any unit that adds up over slots."""

    bits: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """The option of each slot by its index, and the sums of bits and error."""

    choice: tuple[int, ...]
    bits: int
    error: float


class _Kept(NamedTuple):
    at: int  # among all options of the slot
    bits: int
    error: float


def allocate(slots: Sequence[Sequence[Option]], budget: int, weights: int) -> Allocation:
    """Choose an option per slot so that the bits are within `budget` and the sum of errors is least.

    Exact unless more than 2048 partial choices compete, and never worse than the best index for all slots
    alike. Deterministic: the same input, the same choice. `weights` is how many the slots hold, for messages.
    Raises UsageError when the budget is below the least options, QuantizationError for a slot without any.
    """
    table = [_frontier(i, options) for i, options in enumerate(slots)]
    least = sum(kept[0].bits for kept in table)
    if least > budget:
        bits, asked = math.ceil(least / weights * 1000) / 1000, budget / weights
        raise UsageError(
            f"no choice of settings is as small as {asked:.4g} bits per weight",
            why=f"The smallest takes {bits:.3f}",
            hint=f"Use --bpw {bits:.3f} or more",
        )
    steps = _hull_steps(table)
    picked, price = _greedy(table, steps, budget)
    found = [_sum(slots, [kept[to].at for kept, to in zip(table, picked, strict=True)])]
    found += [one for one in _uniform(slots) if one.bits <= budget]
    best = min(found, key=lambda one: one.error)
    if price is None:  # every slot has its best
        return best
    better = _search(table, budget, price, best.error)
    if better is not None:
        found.append(_sum(slots, better))
    return min(found, key=lambda one: one.error)


def curve(slots: Sequence[Sequence[Option]]) -> list[tuple[int, float]]:
    """Bits and error of the corners of the convex hull of all choices, from the least bits on.

    No choice lies below the line through them: what any number of bits can buy, as near as one slot's step.
    """
    table = [_frontier(i, options) for i, options in enumerate(slots)]
    bits = sum(kept[0].bits for kept in table)
    error = math.fsum(kept[0].error for kept in table)
    corners = [(bits, error)]
    for step in _hull_steps(table):
        bits, error = bits + step.bits, error - step.gain * step.bits
        corners.append((bits, error))
    return corners


def _sum(slots: Sequence[Sequence[Option]], choice: Sequence[int]) -> Allocation:
    chosen = [options[at] for options, at in zip(slots, choice, strict=True)]
    error = math.fsum(option.error for option in chosen)
    return Allocation(tuple(choice), sum(option.bits for option in chosen), error)


def _frontier(slot: int, options: Sequence[Option]) -> list[_Kept]:
    """The options that no other of the slot beats in both bits and error, by rising bits."""
    finite = [_Kept(i, *o) for i, o in enumerate(options) if math.isfinite(o.error)]
    kept: list[_Kept] = []
    for option in sorted(finite, key=lambda one: (one.bits, one.error)):
        if not kept or option.error < kept[-1].error:
            kept.append(option)
    if not kept:
        raise QuantizationError(
            f"slot {slot} has no option with a finite error", why=f"It has {len(options)} in all"
        )
    return kept


def _uniform(slots: Sequence[Sequence[Option]]) -> list[Allocation]:
    """The same index for all slots, for every index that all of them have."""
    shared = min(map(len, slots), default=0)
    every = [_sum(slots, [index] * len(slots)) for index in range(shared)]
    return [one for one in every if math.isfinite(one.error)]


class _Step(NamedTuple):
    """From one corner of a slot's convex hull to the next; `gain` is error per bit."""

    gain: float
    slot: int
    to: int
    bits: int


def _hull_steps(table: Sequence[Sequence[_Kept]]) -> list[_Step]:
    """All steps along the slots' lower convex hulls, the largest gain first; a slot's own stay in order."""
    steps: list[_Step] = []
    for slot, kept in enumerate(table):
        at = 0
        while at + 1 < len(kept):
            gains = [(kept[at].error - k.error) / (k.bits - kept[at].bits) for k in kept[at + 1 :]]
            to = at + 1 + max(range(len(gains)), key=lambda i: (gains[i], i))
            steps.append(_Step(gains[to - at - 1], slot, to, kept[to].bits - kept[at].bits))
            at = to
    return sorted(steps, key=lambda step: (-step.gain, step.slot, step.to))


def _greedy(
    table: Sequence[Sequence[_Kept]], steps: Sequence[_Step], budget: int
) -> tuple[list[int], float | None]:
    """Take steps while they fit: the corner of each slot, and the gain of the first that did not fit."""
    picked = [0] * len(table)
    left = budget - sum(kept[0].bits for kept in table)
    stuck: set[int] = set()
    price: float | None = None
    for step in steps:
        if step.slot in stuck:
            continue
        if step.bits <= left:
            picked[step.slot], left = step.to, left - step.bits
        else:
            stuck.add(step.slot)
            price = step.gain if price is None else price
    return picked, price


@dataclass(frozen=True, eq=False)
class _States:
    """Partial choices: `bits`, and `regret`, the error and priced bits beyond the cheapest of each slot."""

    bits: npt.NDArray[np.int64]
    regret: npt.NDArray[np.float64]
    parent: npt.NDArray[Any]
    option: npt.NDArray[Any]

    def only(self, which: npt.NDArray[Any]) -> _States:
        return _States(self.bits[which], self.regret[which], self.parent[which], self.option[which])


def _search(table: Sequence[Sequence[_Kept]], budget: int, price: float, error: float) -> list[int] | None:
    """The best choice of less than `error`, or None where there is none.

    A choice's error is the bound plus its regret plus the price of the bits that it leaves.
    """
    costs = [[option.error + price * option.bits for option in kept] for kept in table]
    cheapest = [min(row) for row in costs]
    gap = error - (math.fsum(cheapest) - price * budget)
    gap = max(gap, 0) + ROUNDING * (abs(error) + price * budget)
    viable = [
        [(at, kept[at].bits, cost - low) for at, cost in enumerate(row) if cost - low <= gap]
        for kept, row, low in zip(table, costs, cheapest, strict=True)
    ]
    lows = _suffix_sums([min(bits for _, bits, _ in rows) for rows in viable])
    highs = _suffix_sums([max(bits for _, bits, _ in rows) for rows in viable])
    zero = np.zeros(1, np.int64)
    states = _States(zero, np.zeros(1), zero, zero)
    trail: list[_States] = []
    for rows, low, high in zip(viable, lows[1:], highs[1:], strict=True):
        states = _extended(states, rows)
        unused = np.maximum(budget - states.bits - high, 0)
        possible = (states.bits + low <= budget) & (states.regret + price * unused <= gap)
        states = _unbeaten(states.only(possible), price)
        trail.append(states)
    if not len(states.bits):
        return None
    at = int(np.argmin(states.regret - price * states.bits))
    choice: list[int] = []
    for kept, past in zip(reversed(table), reversed(trail), strict=True):
        choice.append(kept[int(past.option[at])].at)
        at = int(past.parent[at])
    return choice[::-1]


def _suffix_sums(values: Sequence[int]) -> list[int]:
    """The sum of the values from each position on, and 0 behind the last."""
    sums = [0]
    for value in reversed(values):
        sums.append(sums[-1] + value)
    return sums[::-1]


def _extended(states: _States, rows: Sequence[tuple[int, int, float]]) -> _States:
    """Every partial choice with every option of the next slot."""
    at, bits, regret = (np.array(column) for column in zip(*rows, strict=True))
    return _States(
        (states.bits[:, None] + bits).ravel(),
        (states.regret[:, None] + regret).ravel(),
        np.repeat(np.arange(len(states.bits)), len(rows)),
        np.tile(at, len(states.bits)),
    )


def _unbeaten(states: _States, price: float) -> _States:
    """The partial choices that no other beats in both bits and error, by rising bits; not too many."""
    error = states.regret - price * states.bits
    states = states.only(np.lexsort((error, states.bits)))
    error = states.regret - price * states.bits
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], error[:-1])))
    states = states.only(error < best_before)
    if len(states.bits) <= STATES:
        return states
    spread = states.bits - states.bits[0]
    bucket = spread * STATES // (int(spread[-1]) + 1)
    order = np.lexsort((states.regret, bucket))
    first = np.concatenate(([True], np.diff(bucket[order]) > 0))
    return states.only(np.sort(order[first]))
