"""The allocation against brute force, a naive dynamic program, uniform choices, and real tables of costs."""

from __future__ import annotations

import functools
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.exl2.settings import bits_of, groups_for, settings_for
from dsconvert.errors import QuantizationError, UsageError
from dsconvert.quantization import allocate as allocate_module
from dsconvert.quantization.allocate import Allocation, Option, allocate

Slots = list[list[Option]]
CLOSE = 1e-9

errors = st.one_of(
    st.floats(0, 10, allow_nan=False),
    st.integers(0, 4).map(float),  # equal sums
    st.floats(1e-12, 1e-6),
    st.just(math.inf),
)
options = st.lists(st.builds(Option, st.integers(0, 40), errors), min_size=1, max_size=5).filter(
    lambda row: any(math.isfinite(option.error) for option in row)
)
models = st.lists(options, min_size=0, max_size=5)


def brute_force(slots: Slots, budget: int) -> float | None:
    """The least error within the budget, of all choices; None where none fits."""
    best = None
    for choice in itertools.product(*slots):
        error = sum(option.error for option in choice)
        fits = sum(option.bits for option in choice) <= budget and math.isfinite(error)
        if fits and (best is None or error < best):
            best = error
    return best


def assert_valid(found: Allocation, slots: Slots, budget: int) -> None:
    chosen = [row[at] for row, at in zip(slots, found.choice, strict=True)]
    assert found.bits == sum(option.bits for option in chosen) <= budget
    assert found.error == math.fsum(option.error for option in chosen)


@settings(max_examples=600, deadline=None)
@given(models, st.integers(0, 160))
def test_exact_on_small_cases(slots: Slots, budget: int) -> None:
    best = brute_force(slots, budget)
    if best is None:
        with pytest.raises(UsageError, match="bits per weight"):
            allocate(slots, budget, 10)
        return
    found = allocate(slots, budget, 10)
    assert_valid(found, slots, budget)
    assert found.error <= best * (1 + CLOSE) + 1e-14


def naive_program(slots: Slots, budget: int) -> float:
    """The least error by a table over every number of bits."""
    table = [0.0] * (budget + 1)
    for row in slots:
        table = [
            min((table[b - o.bits] + o.error for o in row if o.bits <= b), default=math.inf)
            for b in range(budget + 1)
        ]
    return table[budget]


@pytest.mark.parametrize("seed", range(25))
def test_exact_on_middling_cases(seed: int) -> None:
    rng = random.Random(seed)
    slots = []
    for _ in range(rng.randint(10, 30)):
        sensitivity = math.exp(rng.gauss(0, 1))
        bits = sorted(rng.sample(range(1, 60), 8))
        slots.append([Option(b, sensitivity * 2 ** (-b / 8) * rng.uniform(0.8, 1.2)) for b in bits])
    least = sum(min(option.bits for option in row) for row in slots)
    budget = least + rng.randint(0, 30 * len(slots))
    found = allocate(slots, budget, 1000)
    assert_valid(found, slots, budget)
    assert found.error == pytest.approx(naive_program(slots, budget), rel=CLOSE)


@functools.cache
def candidate_bits(role: str, outputs: int, inputs: int) -> list[int]:
    return [bits_of(inputs, outputs, groups_for(inputs, s)) for s in settings_for(role, inputs)]


def realistic(linears: list[tuple[str, int, int]], seed: int) -> tuple[Slots, int]:
    """The real costs of every candidate; errors that fall fourfold a bit, by sensitivities far apart."""
    rng = random.Random(seed)
    slots: Slots = []
    for role, outputs, inputs in linears:
        sensitivity = outputs * inputs * math.exp(rng.gauss(0, 1))
        row = []
        for bits in candidate_bits(role, outputs, inputs):
            error = sensitivity * 4 ** (-bits / inputs / outputs) * math.exp(rng.gauss(0, 0.1))
            row.append(Option(bits, error))
        slots.append(row)
    return slots, sum(outputs * inputs for _, outputs, inputs in linears)


def block(d: int, kv: int, ff: int) -> list[tuple[str, int, int]]:
    attention = [("qkv", d, d), ("qkv", kv, d), ("qkv", kv, d), ("o", d, d)]
    return [*attention, ("gate_up", ff, d), ("gate_up", ff, d), ("down", d, ff)]


MODELS = {
    "SmolLM2-135M": (30, (576, 192, 1536)),
    "DeepSeek-VL 1.3B": (24, (2048, 2048, 5632)),
    "DeepSeek LLM 67B": (95, (8192, 1024, 22016)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("bpw", [2.5, 3.0, 4.0, 4.65, 5.0, 6.0, 7.5])
def test_real_budgets_are_used(name: str, bpw: float) -> None:
    layers, sizes = MODELS[name]
    slots, weights = realistic(block(*sizes) * layers, layers)
    budget = int(bpw * weights)
    found = allocate(slots, budget, weights)
    assert_valid(found, slots, budget)
    assert bpw - 0.01 < found.bits / weights <= bpw
    uniform = [o for o in uniform_choices(slots) if o.bits <= budget]
    assert not uniform or found.error < min(o.error for o in uniform)
    assert allocate(slots, budget, weights) == found
    order = list(range(len(slots)))
    random.Random(0).shuffle(order)
    other = allocate([slots[i] for i in order], budget, weights)
    assert other.error == pytest.approx(found.error, rel=1e-4)


def uniform_choices(slots: Slots) -> list[Option]:
    count = min(map(len, slots))
    return [Option(sum(r[i].bits for r in slots), math.fsum(r[i].error for r in slots)) for i in range(count)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.builds(Option, st.integers(1, 40), errors), min_size=4, max_size=4), min_size=1))
def test_never_worse_than_uniform_even_when_thinned(slots: Slots) -> None:
    budget = max(option.bits for option in uniform_choices(slots))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate_module, "STATES", 1)
        try:
            found = allocate(slots, budget, 100)
        except QuantizationError:
            assert any(not any(math.isfinite(o.error) for o in row) for row in slots)
            return
    assert_valid(found, slots, budget)
    for option in uniform_choices(slots):
        assert option.bits > budget or found.error <= option.error


def test_linears_that_are_all_alike_share_the_budget_unevenly() -> None:
    row = [Option(200, 8.0), Option(400, 1.0), Option(800, 0.1)]
    found = allocate([row] * 101, 101 * 200 + 37 * 200, 101 * 100)
    assert sorted(found.choice) == [0] * 64 + [1] * 37


def test_more_bits_never_make_it_worse() -> None:
    slots, weights = realistic(block(576, 192, 1536), 3)
    found = [allocate(slots, int(weights * 2.4) + i * 20_000, weights).error for i in range(150)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0] / 4


def test_a_budget_that_holds_everything_takes_the_best() -> None:
    slots = [[Option(10, 2.0), Option(20, 1.0), Option(30, 1.5)], [Option(5, 0.5)]]
    assert allocate(slots, 1000, 10) == Allocation((1, 0), 25, 1.5)
    assert allocate(slots, 25, 10) == Allocation((1, 0), 25, 1.5)
    assert allocate([], 0, 1) == Allocation((), 0, 0.0)


def test_a_budget_below_the_least_is_refused_with_the_least() -> None:
    slots, weights = realistic(block(576, 192, 1536), 1)
    least = sum(min(option.bits for option in row) for row in slots)
    assert allocate(slots, least, weights).bits == least
    with pytest.raises(UsageError) as caught:
        allocate(slots, least - 1, weights)
    named = math.ceil(least / weights * 1000) / 1000
    assert f"--bpw {named:.3f}" in str(caught.value)
    allocate(slots, int(named * weights), weights)  # what it names is enough
    with pytest.raises(UsageError, match="as small as 2 bits"):
        allocate(slots, 2 * weights, weights)


def test_a_slot_without_options_is_named() -> None:
    for row in ([], [Option(3, math.nan)], [Option(3, math.inf)]):
        with pytest.raises(QuantizationError, match="slot 1"):
            allocate([[Option(1, 1.0)], row], 100, 10)
    nan = [Option(3, math.nan), Option(4, 2.0)]
    assert allocate([nan], 100, 10).choice == (1,)
