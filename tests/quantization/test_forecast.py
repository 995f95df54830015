"""The time that a run is foretold to take: its products against those that a walk makes, and its words."""

from __future__ import annotations

import pytest
import torch
from decoders import opened

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.quantization import forecast
from dsconvert.quantization.forecast import Seconds, Speed, Text, foretell


@pytest.mark.parametrize(("fixed", "kept"), [(True, 0), (False, 99), (False, 0)])
def test_the_linears_are_foretold_as_often_as_they_run(
    fixed: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, decoder, windows = opened(num_key_value_heads=2)
    monkeypatch.setattr(linear_inputs, "room", lambda decoder, windows, length, inputs: min(kept, windows))
    monkeypatch.setattr(forecast, "measure_speed", lambda decoder, side=0: Speed(1.0, 1.0, 1.0, 1.0, 1.0))
    block, made = st.load_block(decoder, 0), [0.0]

    def count(linear: torch.nn.Linear, given: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
        made[0] += 2.0 * linear.weight.numel() * given[0].shape[:-1].numel()

    for linear in block.linears.values():
        linear.register_forward_hook(count)
    list(block_walk.walk(decoder, block, linear_inputs.embed(decoder, windows), fixed=fixed))
    attention = 2.0 * windows.size * windows.shape[1] * decoder.config.hidden_size
    ahead = foretell(decoder, Text(*windows.shape, fixed=fixed), passes=2.0, finished=1)
    assert len(ahead) == decoder.config.layers
    assert ahead[0] == Seconds(run=ahead[0].run)
    assert ahead[0].run == pytest.approx(made[0] + attention)
    shapes = [linear.weight.shape for linear in block.linears.values()]
    inputs = [block_walk.groups(decoder, 1)[at][0] for at in range(4)]
    widths = [decoder.source.shapes()[name][1] for name in inputs]
    assert ahead[1].sums == pytest.approx(forecast.TRIANGLE * windows.size * sum(k * k for k in widths))
    assert ahead[1].solve > sum(2.0 * n * k * k for n, k in shapes)


def test_what_is_left_goes_by_the_blocks_that_ran() -> None:
    ahead = [Seconds(1.0, 2.0, 1.0)] * 4 + [Seconds(solve=2.0)]
    assert forecast.left(ahead, [6.0]) == pytest.approx(21.0)
    assert forecast.left(ahead, [6.0, 2.0, 4.0]) == pytest.approx(6.0)
    assert forecast.left(ahead, [1.0] * 5) == 0.0
    assert forecast.told(ahead) == (
        "about 18 s for 5 blocks by this machine's speed "
        "(22 % their linears, 44 % sums of inputs, 33 % solving)"
    )
    assert forecast.told(ahead[4:]).startswith("about 2 s for 1 block by")


def test_times_are_told_as_people_say_them() -> None:
    seconds = (0.01, 89.4, 90, 3600, 5399, 5401, 200_000)
    assert [forecast.duration(s) for s in seconds] == [
        "1 s", "89 s", "2 min", "60 min", "1 h 30 min", "1 h 30 min", "55 h 33 min"
    ]  # fmt: skip


def test_a_long_run_is_foretold_by_longer_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    _, decoder, windows = opened()
    sides: list[int] = []

    def measured(decoder: st.Decoder, side: int = forecast.SIDE) -> Speed:
        sides.append(side)
        return Speed(*[1e15 if side == forecast.SIDE else 1e3] * 5)

    monkeypatch.setattr(forecast, "measure_speed", measured)
    text = Text(*windows.shape, fixed=True)
    quick = foretell(decoder, text, passes=2.0)
    monkeypatch.setattr(forecast, "LONG", 0.0)
    slow = foretell(decoder, text, passes=2.0)
    assert sides == [forecast.SIDE, forecast.SIDE, forecast.WIDE]
    assert slow[0].total == pytest.approx(1e12 * quick[0].total)


def test_this_machine_has_a_speed() -> None:
    speed = forecast.measure_speed(opened()[1])
    assert min(speed.products, speed.factors, speed.loops) > 1e7
    assert speed.runs == speed.sums == speed.products
