"""Calibrated MLX of experts and latent attention: each expert by its own tokens, kv_b_proj as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny_experts
from calibrated import Stop, stopper

from converters.mlx.affine import Affine, nearest
from converters.mlx.convert import convert
from converters.mlx.reader import open_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.events import Check, Event
from dsconvert.models.config import load_json
from dsconvert.quantization.run import LinearSolved

pytest.importorskip("torch")
KV_B = "self_attn.kv_b_proj.weight"


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3 of a dense layer and one of experts."""
    return tiny_experts.checkpoint(tmp_path_factory.mktemp("mlx") / "v3", "v3", **tiny_experts.SMALL_V3)


def run(model: Path, out: Path, **more: Any) -> list[Event]:
    asked = {"calib": "builtin", "calib_samples": 4, "calib_len": 128, "group_size": 32, "effort": "off"}
    return list(convert(calibrated.mlx_options(model, out=out, **{**asked, **more})))


def test_experts_are_solved_and_proven_and_a_stopped_run_goes_on(
    v3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop: Stop = stopper(monkeypatch)
    events = run(v3, tmp_path / "whole", effort="quick")
    assert [e.detail for e in events if isinstance(e, Check) and not e.passed] == []
    read, source = open_model(tmp_path / "whole"), open_checkpoint(v3)
    assert read.shapes() == source.shapes()
    solved = {e.name: e for e in events if isinstance(e, LinearSolved)}
    assert not any(name.endswith(KV_B) for name in solved)
    for layer in range(2):
        name = f"model.layers.{layer}.{KV_B}"
        assert read.dtype(name) == source.dtype(name)
        np.testing.assert_array_equal(read.float32(name), source.float32(name))
    few = {name for name, e in solved.items() if e.fell_back}
    experts = {name for name in solved if ".mlp.experts." in name}
    assert few < experts
    assert len(experts) == 24
    for name in experts:
        plain = nearest(source.float32(name), Affine(4, 32), source.dtype(name))
        assert np.array_equal(read.float32(name), plain) == (name in few)
    meta = load_json(tmp_path / "whole" / "config.json")["quantization_config"]["meta"]
    assert meta.get("round_to_nearest", {}) == {name: solved[name].fell_back for name in few}
    stop(lambda: run(v3, tmp_path / "out"), tmp_path / "out", 2)  # the head is left
    run(v3, tmp_path / "out", resume=True)
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")
