"""What settings are foretold to cost, against what the solver then makes of them; the measurement's file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import random_llama
import torch

from converters.exl2 import measure
from converters.exl2.measure import measure_linear
from converters.exl2.settings import bits_of, groups_for, named, settings_for
from converters.exl2.solver import solve
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import CheckpointError, QuantizationError
from dsconvert.proof import compare
from dsconvert.quantization.run_state import open_state

DAMP = 0.05


def problem(outputs: int, inputs: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, a Hessian of correlated inputs of different sizes, and uneven sensitivities."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(4 * inputs, inputs // 4) @ normal(inputs // 4, inputs) + 0.5 * normal(4 * inputs, inputs)
    x *= torch.exp(0.7 * normal(inputs))
    return normal(outputs, inputs) * 0.02, 2 / len(x) * x.T @ x, torch.exp(normal(outputs))


@pytest.mark.parametrize("role", ["qkv", "gate_up", "down"])
def test_what_is_foretold_is_what_the_solver_leaves(role: str) -> None:
    W, H, s = problem(160, 256, seed=1)
    options = measure_linear("name", W, H, s, role, DAMP)
    assert [o.setting for o in options] == [setting.text for setting in settings_for(role, 256)]
    for option in options[::3]:
        groups = groups_for(256, named(option.setting))
        assert option.bits == bits_of(256, 160, groups)
        E = W - solve(W, H, groups, DAMP).weight
        real = float((((E @ H) * E).sum(1) * s).sum()) / 4
        # At 2 bits the feedback itself makes values leave the grid, which no plain rounding sees.
        rel = 0.5 if "2b" in option.setting else 0.15
        assert option.error == pytest.approx(real, rel=rel), option.setting


def test_some_outputs_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H, s = problem(640, 128, seed=2)
    some = measure_linear("name", W, H, s, "o", DAMP)
    monkeypatch.setattr(measure, "OUTPUTS", 640)
    for part, whole in zip(some, measure_linear("name", W, H, s, "o", DAMP), strict=True):
        assert part.error == pytest.approx(whole.error, rel=0.2)


def test_more_bits_cost_less_on_the_whole() -> None:
    W, H, s = problem(128, 256, seed=3)
    options = sorted(measure_linear("name", W, H, s, "qkv", DAMP), key=lambda o: o.bits)
    assert options[0].error > 100 * options[-1].error
    assert all(a.error > b.error for a, b in zip(options, options[4:], strict=False))


def test_a_broken_weight_is_named() -> None:
    W, H, s = problem(64, 64, seed=4)
    W[3, 3] = float("nan")
    with pytest.raises(QuantizationError, match=r"model\.layers\.0\.x"):
        measure_linear("model.layers.0.x", W, H, s, "o", DAMP)


def measured(folder: Path, state_only: bool = False) -> Any:
    _, source, config = random_llama.make()
    decoder = st.open_decoder(source, config, torch.device("cpu"), torch.float32)
    windows = random_llama.tokens(config, 2, 48)
    kinds = {n: False for block in decoder.blocks for n in block.values() if n.endswith("_proj.weight")}
    with open_state(folder / "out", {}, True) as state:
        found = compare.result(measure.measure(decoder, windows, state, 0.01, 0, kinds))
        if state_only:
            raise KeyboardInterrupt
    return found


def test_blocks_that_are_measured_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, state_only=True)
    (tmp_path / "out.state" / "measured-00002.json").unlink()
    names: list[str] = []
    real = measure.measure_linear

    def counted(name: str, *rest: Any) -> Any:
        names.append(name)
        return real(name, *rest)

    monkeypatch.setattr(measure, "measure_linear", counted)
    again = measured(tmp_path)
    assert len(names) == 7
    assert all(name.startswith("model.layers.2.") for name in names)
    (tmp_path / "other").mkdir()
    assert again == measured(tmp_path / "other")  # a run that was never stopped
    assert len(again) == 21


SHAPES = {"a.weight": (32, 64)}
GOOD = {"shapes": {"a.weight": [32, 64]}, "linears": {"a.weight": [["4b100%g128", 9000, 0.25]]}}


def test_a_measurement_is_read_as_it_was_written(tmp_path: Path) -> None:
    options = {
        "a.weight": [measure.Option("4b100%g128", 9000, 0.1 + 0.2), measure.Option("8b100%g128", 17000, 0.0)]
    }
    measure.save(tmp_path / "m.json", options, SHAPES)
    assert measure.load(tmp_path / "m.json", SHAPES) == options
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": {"a.weight": [32, 96]}}, "another model"),
        ({"linears": {}}, "another model"),
        ({"linears": {"a.weight": []}}, "not a readable measurement"),
        ({"linears": {"a.weight": [["4b100%g128", 9000, float("nan")]]}}, "not a readable measurement"),
        ({"linears": {"a.weight": [["4b100%g128", 0, 0.1]]}}, "not a readable measurement"),
        ({"linears": {"a.weight": [["4b100%g128", "many", 0.1]]}}, "not a readable measurement"),
        ({"linears": [1]}, "not a readable measurement"),
    ],
)
def test_what_is_no_measurement_of_this_model_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(CheckpointError, match=words):
        measure.load(path, SHAPES)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON.*--measurement"):
        measure.load(tmp_path / "m.json", SHAPES)
