"""Models with experts and latent attention, and fp8 checkpoints, whose codes pass through as they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny_experts

from converters.compressed import costs
from converters.compressed.convert import convert
from converters.compressed.reader import open_model
from converters.gptq.convert import convert as gptq
from converters.gptq.reader import open_model as gptq_folder
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.safetensors_reader import Stored, read_safetensors
from dsconvert.events import Check, Event, Warn
from dsconvert.models.config import load_json
from dsconvert.quantization.budget import Budget


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """V3 of two layers, one with experts: as it is, in fp8, with scales that are powers of two."""
    folder = tmp_path_factory.mktemp("experts")
    model = tiny_experts.checkpoint(folder / "v3", "v3", num_hidden_layers=2, first_k_dense_replace=1)
    fp8, plain = tiny_experts.to_fp8(model)
    plain.rename(folder / "before")  # the other kind makes one of this name
    powers, plain = tiny_experts.to_fp8(model, "f8_e8m0")
    small = tiny_experts.checkpoint(folder / "small", "v3", **tiny_experts.SMALL_V3)
    return {"f32": fp8, "powers": powers, "powers in float32": plain, "small": small}


def run(model: Path, out: Path, **more: Any) -> list[Event]:
    return list(convert(calibrated.compressed_options(model, out=out, **{"effort": "off", **more})))


def data(stored: Stored) -> bytes:
    return bytes(stored.raw(0, stored.nbytes))


def test_fp8_passes_through_without_a_second_rounding(tmp_path: Path, v3: dict[str, Path]) -> None:
    events = run(v3["f32"], tmp_path / "out", scheme="fp8-block", effort="full")
    checks = {e.name: e for e in events if isinstance(e, Check)}
    assert [check.detail for check in checks.values() if not check.passed] == []
    assert checks["mean KLD"].value == 0
    folders = (v3["f32"], tmp_path / "out")
    theirs, ours = (read_safetensors(folder / "model.safetensors") for folder in folders)
    linears = [name for name, stored in theirs.items() if stored.dtype == "f8_e4m3"]
    assert len(linears) > 60
    for name in linears:
        assert data(ours[name]) == data(theirs[name])
        assert data(ours[f"{name.removesuffix('weight')}weight_scale"]) == data(theirs[f"{name}_scale_inv"])
    settings = load_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert settings["quant_method"] == "compressed-tensors"
    assert settings["ignore"] == ["lm_head", "model.layers.1.mlp.gate"]


def test_scales_that_are_powers_of_two_become_float32(tmp_path: Path, v3: dict[str, Path]) -> None:
    run(v3["powers"], tmp_path / "out", scheme="fp8-block")
    read, source = open_model(tmp_path / "out"), open_checkpoint(v3["powers in float32"])
    for name in (f"{linear}.weight" for linear in read.linears):
        np.testing.assert_array_equal(read.float32(name), source.float32(name), err_msg=name)


def test_experts_in_four_bits_are_proven(tmp_path: Path, v3: dict[str, Path]) -> None:
    events = run(v3["f32"], tmp_path / "out", scheme="nvfp4a16", effort="full")
    checks = {e.name: e for e in events if isinstance(e, Check)}
    assert [check.detail for check in checks.values() if not check.passed] == []
    assert "experts" in checks
    assert any(isinstance(e, Warn) and "transformers will not read this" in e.text for e in events)
    read = open_model(tmp_path / "out")
    assert {read.dtype(f"model.layers.1.{name}.weight") for name in (
        "self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_b_proj", "mlp.experts.15.down_proj",
        "mlp.shared_experts.up_proj")} == {"nvfp4"}  # fmt: skip
    assert read.dtype("model.layers.1.mlp.gate.weight") == "bf16"
    fused = [read.linears[f"model.layers.1.self_attn.{x}"] for x in ("q_a_proj", "kv_a_proj_with_mqa")]
    first, second = (one.parts["weight_global_scale"].rows(0, 1).tolist() for one in fused)
    assert first == second


def test_integers_are_those_of_the_gptq_folder(tmp_path: Path, v3: dict[str, Path]) -> None:
    """Of each expert, too, though it saw few tokens; proven, and the same settings give the same weights."""
    asked = {"calib": "builtin", "calib_samples": 4, "calib_len": 128, "group_size": 32}
    events = run(v3["small"], tmp_path / "w4a16", scheme="w4a16", effort="quick", **asked)
    assert [e.detail for e in events if isinstance(e, Check) and not e.passed] == []
    said = " ".join(e.text for e in events if isinstance(e, Warn))
    assert "transformers will not read this" in said
    assert "matrices of experts are left to round-to-nearest" in said
    list(gptq(calibrated.gptq_options(v3["small"], out=tmp_path / "gptq", effort="off", **asked)))
    ours, theirs = open_model(tmp_path / "w4a16"), gptq_folder(tmp_path / "gptq")
    assert len(ours.linears) == 40
    for name in (f"{linear}.weight" for linear in ours.linears):
        np.testing.assert_array_equal(ours.float32(name), theirs.float32(name), err_msg=name)


def test_experts_of_a_layer_have_one_scheme_by_what_all_of_them_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by the share of the tokens that come to it; an indexer has the widest, whatever the text."""
    model = tiny_experts.checkpoint(tmp_path / "v32", "v32", **tiny_experts.SMALL_V3, index_n_heads=4)
    asked = {"calib": "builtin", "calib_samples": 4, "calib_len": 128}
    types, few, real = ("w3a16-32g", "w4a16-32g", "w8a16-32g"), list[str](), costs.linear_costs

    def of_unit_cost(*given: Any) -> dict[str, float]:
        """What is measured, by what 8 bits cost, so that shares of tokens are left of these."""
        few.extend([given[-1]] if given[-1] else [])
        found = real(*given)
        return {label: nats / found["w8a16-32g"] for label, nats in found.items()}

    monkeypatch.setattr(costs, "linear_costs", of_unit_cost)
    budget = Budget(bpw=5, types=types, measurement=tmp_path / "shares.json")
    events = run(model, tmp_path / "out", budget=budget, **asked)
    said = " ".join(event.text for event in events if isinstance(event, Warn))
    shares = {name: own["w8a16-32g"] for name, own in load_json(tmp_path / "shares.json")["nats"].items()}
    for part in ("gate_proj", "up_proj", "down_proj"):  # of eight experts each token goes to two
        each = [shares[f"model.layers.1.mlp.experts.{e}.{part}.weight"] for e in range(8)]
        assert sum(each) == pytest.approx(2)
        assert max(each) < 1
    assert shares["model.layers.1.self_attn.kv_b_proj.weight"] == 1
    assert f"what types cost of {len(few)} matrices of experts is told by fewer calibration tokens" in said
    assert 0 < len(few) < 24
    labels = {name: one.settings.label for name, one in open_model(tmp_path / "out").linears.items()}
    assert len({label for name, label in labels.items() if ".experts." in name}) == 1
    assert len(set(labels.values())) > 1
    assert {label for name, label in labels.items() if ".indexer." in name} == {"w8a16-32g"}
    groups = load_json(tmp_path / "out" / "config.json")["quantization_config"]["config_groups"].values()
    for name, label in labels.items():
        (bits,) = (
            g["weights"]["num_bits"] for g in groups if any(re.match(t[3:], name) for t in g["targets"])
        )
        assert label == f"w{bits}a16-32g"
