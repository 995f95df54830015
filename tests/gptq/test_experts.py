"""GPTQ of experts and latent attention: each expert by the tokens that come to it, from an fp8 checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny_experts
from calibrated import Stop, stopper

from converters.gptq.convert import convert
from converters.gptq.reader import open_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.events import Check, Event, Warn
from dsconvert.models.config import load_json
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.gptq_solver import SolverOptions, round_to_nearest
from dsconvert.quantization.linears import select
from dsconvert.quantization.run import LinearSolved

torch = pytest.importorskip("torch")
AT = "model.layers.1.mlp."


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3 of a dense layer and one of experts, in fp8."""
    folder = tmp_path_factory.mktemp("experts")
    return tiny_experts.to_fp8(tiny_experts.checkpoint(folder / "v3", "v3", **tiny_experts.SMALL_V3))[0]


def run(model: Path, out: Path, **more: Any) -> list[Event]:
    asked = {"calib": "builtin", "calib_samples": 4, "calib_len": 128, "group_size": 32, "effort": "off"}
    return list(convert(calibrated.gptq_options(model, out=out, **{**asked, **more})))


@pytest.fixture(scope="module")
def made(v3: Path) -> tuple[Path, list[Event]]:
    """The folder, proven, and what was said on the way."""
    out = v3.parent / "out"
    return out, run(v3, out, effort="quick")


def test_every_matrix_but_the_router_is_quantized_and_proven(
    v3: Path, made: tuple[Path, list[Event]]
) -> None:
    out, events = made
    checks = {e.name: e for e in events if isinstance(e, Check)}
    assert [check.detail for check in checks.values() if not check.passed] == []
    assert "experts" in checks
    read, source = open_model(out), open_checkpoint(v3)
    assert read.shapes() == source.shapes()
    kept = {name for name in read.shapes() if not read.dtype(name).startswith("gptq")}
    assert {name for name in kept if len(read.shapes()[name]) > 1} == {
        "model.embed_tokens.weight", "lm_head.weight", f"{AT}gate.weight",
    }  # fmt: skip
    assert read.dtype(f"{AT}gate.weight") == source.dtype(f"{AT}gate.weight") == "bf16"
    assert f"{AT}experts.7.down_proj.qweight" in read.checkpoint.tensors
    assert load_json(out / "config.json")["quantization_config"]["quant_method"] == "gptq"
    said = " ".join(e.text for e in events if isinstance(e, Warn))
    assert "transformers will not read this: it fuses experts" in said


def test_the_weights_of_an_indexers_heads_are_kept(tmp_path: Path) -> None:
    """transformers reads the type of that matrix's `weight`, which a quantized linear has not."""
    selection = select(tiny_experts.checkpoint(tmp_path / "v32", "v32"), language_only=False)
    indexer = "model.layers.0.self_attn.indexer."
    assert {f"{indexer}wq_b.weight", f"{indexer}wk.weight"} < selection.linears.keys()
    assert f"{indexer}weights_proj.weight" in selection.kept
    assert f"{indexer}weights_proj.weight" not in selection.linears


def test_experts_that_saw_few_tokens_are_rounded_to_nearest_and_named(
    v3: Path, made: tuple[Path, list[Event]]
) -> None:
    out, events = made
    solved = {e.name: e for e in events if isinstance(e, LinearSolved)}
    few = {name for name, e in solved.items() if e.fell_back}
    assert 0 < len(few) < 24
    assert all(".mlp.experts." in name for name in few)
    meta = load_json(out / "config.json")["quantization_config"]["meta"]
    assert meta["round_to_nearest"] == {name: solved[name].fell_back for name in few}
    (said,) = [e.text for e in events if isinstance(e, Warn) and "matrices of experts" in e.text]
    assert said.startswith(f"block 2: {len(few)} of 24 matrices of experts are left to round-to-nearest")
    read, source = open_model(out), open_checkpoint(v3)
    options = SolverOptions(Scheme(4, 32, True), act_order=True)
    for name, event in solved.items():
        if ".mlp.experts." not in name:
            continue
        tokens = int(event.fell_back.split()[0]) if event.fell_back else None
        assert tokens is None or tokens < read.shapes()[name][1] / 4
        plain = round_to_nearest(torch.from_numpy(source.float32(name)), options).dequantized().numpy()
        assert np.array_equal(read.float32(name), plain) == (tokens is not None)
        assert event.loss < event.rtn_loss or tokens is not None


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(
    v3: Path, made: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has the block of experts behind it, whose states are made of the solved experts."""
    stop: Stop = stopper(monkeypatch)
    out = tmp_path / "out"
    head = {"lm_head": True}  # the block after the last
    run(v3, tmp_path / "whole", **head)
    stop(lambda: run(v3, out, **head), out, 2)
    run(v3, out, resume=True, **head)
    assert calibrated.digests(out) == calibrated.digests(tmp_path / "whole")
