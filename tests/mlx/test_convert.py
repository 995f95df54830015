"""The flow of `dsconvert mlx`: rounded or solved, proven, resumed, refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.mlx import convert as flow
from converters.mlx.convert import convert
from converters.mlx.plan import Options, prepare
from converters.mlx.reader import open_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Finished, Planned
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import load_json
from dsconvert.quantization.run import LinearSolved
from dsconvert.quantization.run_state import state_folder

TEXT: dict[str, Any] = {"calib": "builtin", "calib_samples": 4, "calib_len": 128}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("mlx") / "model", layers=3, bias=True)


def run(model: Path | str, out: Path, **more: Any) -> list[Event]:
    asked = {"group_size": 32, "effort": "off", **more}
    return list(convert(calibrated.mlx_options(model, out=out, **asked)))


def failed(events: list[Event]) -> list[str]:
    checks = [event for event in events if isinstance(event, Check)]
    assert len(checks) >= 5
    return [check.detail for check in checks if not check.passed]


def test_the_sample_is_quantized_proven_and_known_to_every_command(tmp_path: Path) -> None:
    out, text = tmp_path / "out", ["--calib", "builtin", "--calib-samples", "8", "--calib-len", "128"]
    done = CliRunner().invoke(cli, ["mlx", "sample:", *text, "--head-bits", "8", "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    checks = {e["name"]: e for e in events if e["event"] == "check"}
    assert {"structure", "tokenizer", "weights", "mean KLD", "PPL ratio"} <= checks.keys()
    assert 0 < checks["mean KLD"]["value"] < 0.01
    for words in (
        ["compare", str(out), "--against", "sample:", "--windows", "1", "--length", "64"],
        ["memory", str(out)],
    ):
        told = CliRunner().invoke(cli, words)
        assert told.exit_code == 0, told.output
        assert "mlx" in told.output
    assert not state_folder(out).exists()
    config, read = load_json(out / "config.json"), open_model(out)
    own = {"group_size": 64, "bits": 8, "mode": "affine"}
    usual = {"group_size": 64, "bits": 4, "mode": "affine"}
    assert config["quantization"] == {**usual, "model.embed_tokens": own, "lm_head": own}
    assert config["quantization_config"]["meta"]["calibration"]["text"] == "builtin"
    assert [read.dtype(f"{name}.weight") for name in ("lm_head", "model.layers.0.mlp.up_proj")] == [
        "mlx8",
        "mlx4",
    ]


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_every_width_is_rounded_planned_to_the_byte_and_solved_for_less_loss(
    tmp_path: Path, model: Path, bits: int
) -> None:
    events = run(model, tmp_path / "plain", bits=bits)
    (planned,) = (e for e in events if isinstance(e, Planned))
    (finished,) = (e for e in events if isinstance(e, Finished))
    stored = open_model(tmp_path / "plain").checkpoint.tensors.values()
    nbytes = sum(tensor.nbytes for tensor in stored)
    assert planned.nbytes == (nbytes,)
    assert finished.nbytes == nbytes == sum(row.nbytes for row in planned.tensors)
    solved = [e for e in run(model, tmp_path / "fed", bits=bits, **TEXT) if isinstance(e, LinearSolved)]
    assert len(solved) == 3 * 7 + 1
    assert sum(e.loss for e in solved) < 0.9 * sum(e.rtn_loss for e in solved)
    plain, fed = open_model(tmp_path / "plain"), open_model(tmp_path / "fed")
    assert plain.shapes() == fed.shapes() == open_checkpoint(model).shapes()
    name = "model.embed_tokens.weight"  # which has no inputs: its ranges are searched for the least error
    right = open_checkpoint(model).float32(name)
    noise = [float(np.square(read.float32(name) - right).sum()) for read in (plain, fed)]
    assert noise[1] < (0.8 if bits == 2 else 1) * noise[0]


def test_without_a_text_it_passes_its_verdict_and_the_head_may_stay(tmp_path: Path) -> None:
    events = run("sample:", tmp_path / "out", effort="quick", head_bits=16, group_size=128)
    assert failed(events) == []
    read = open_model(tmp_path / "out")
    assert [read.dtype(name) for name in ("model.embed_tokens.weight", "lm_head.weight")] == ["bf16", "bf16"]
    assert len(read.linears) == 14


def test_embedding_and_head_may_stay_beside_solved_linears(tmp_path: Path, model: Path) -> None:
    run(model, tmp_path / "out", head_bits=16, **TEXT)
    read = open_model(tmp_path / "out")
    assert [read.dtype(f"{name}.weight") for name in ("model.embed_tokens", "lm_head")] == ["bf16", "bf16"]


def test_the_verdict_is_about_the_weights_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of other outputs are found out when the folder is read back."""
    right = flow.pack

    def wrong(*arguments: Any) -> Any:
        parts = right(*arguments)
        return {**parts, "weight": np.roll(parts["weight"], 1, axis=0)}

    monkeypatch.setattr(flow, "pack", wrong)
    asked = {**TEXT, "group_size": 64, "effort": "quick"}
    assert any("weight" in why for why in failed(run("sample:", tmp_path / "out", **asked)))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = calibrated.stopper(monkeypatch)
    run(model, tmp_path / "whole", **TEXT)
    stopped(lambda: run(model, tmp_path / "out", **TEXT), tmp_path / "out", 2)
    with pytest.raises(CheckpointError, match="another options"):
        run(model, tmp_path / "out", resume=True, bits=3, **TEXT)
    run(model, tmp_path / "out", resume=True, **TEXT)
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")


@pytest.mark.slow
def test_kill_at_random_moments_and_resume(tmp_path: Path) -> None:
    small = tiny.tiny_checkpoint(tmp_path / "model", layers=4, d=128, ff=352)
    assert calibrated.killed_and_resumed("mlx", small, tmp_path, 4, bits=3, group_size=32) >= 1


@pytest.mark.parametrize("dtype", ["f16", "f32"])
def test_scales_are_of_the_models_type(tmp_path: Path, dtype: str) -> None:
    """And a tied embedding is one matrix, which serves for the head."""
    tied = tiny.tiny_checkpoint(tmp_path / "model", dtype=dtype, tied=True, layers=1)
    run(tied, tmp_path / "out")
    tensors = open_model(tmp_path / "out").checkpoint.tensors
    assert {t.dtype for name, t in tensors.items() if name.endswith((".scales", ".biases"))} == {dtype}
    assert "model.embed_tokens.scales" in tensors
    assert not any(name.startswith("lm_head") for name in tensors)


def test_an_embedding_that_serves_as_the_head_is_solved_by_what_the_head_is_given(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", tied=True, layers=1)
    said = run(model, tmp_path / "out", effort="quick", **{**TEXT, "calib_samples": 32})
    assert failed(said) == []
    *_, head = (event for event in said if isinstance(event, LinearSolved))
    assert head.name == "lm_head.weight"
    assert head.loss < 0.9 * head.rtn_loss
    run(model, tmp_path / "plain")
    read, plain = (open_model(tmp_path / name) for name in ("out", "plain"))
    assert read.shapes() == plain.shapes()
    name = "model.embed_tokens.weight"
    assert not np.array_equal(read.float32(name), plain.float32(name))


def test_shapes_settings_and_classes_are_refused_by_name(tmp_path: Path, model: Path) -> None:
    narrow = tiny.tiny_checkpoint(tmp_path / "narrow", ff=176)
    with pytest.raises(QuantizationError, match="multiple of the group size") as caught:
        run(narrow, tmp_path / "out")
    assert "mlp.down_proj.weight" in str(caught.value)
    with pytest.raises(UsageError, match="groups of 48"):
        run(model, tmp_path / "out", group_size=48)
    with pytest.raises(UsageError, match="7 bits"):
        run(model, tmp_path / "out", bits=7)
    with pytest.raises(UsageError, match="not converted to MLX") as caught_class:
        run("sample-vl:", tmp_path / "out")
    assert "--language-only" in str(caught_class.value)
    assert {name for name, one in ARCHITECTURES.items() if one.mlx and one.mount is None} == {
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "DeepseekForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [narrow]


def test_a_language_model_is_taken_out_of_a_bigger_one(tmp_path: Path) -> None:
    run("sample-vl:", tmp_path / "out", language_only=True)
    assert load_json(tmp_path / "out" / "config.json")["architectures"] == ["LlamaForCausalLM"]
    assert open_model(tmp_path / "out").dtype("lm_head.weight") == "mlx4"


def test_the_folder_is_named_after_the_settings(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = prepare(Options(calibrated.mlx_options(model).run, bits=3, group_size=32, head_bits=6))
    assert job.out == tmp_path / "model-mlx-3bit-32g-head6"


def test_options_of_the_solver_are_refused_without_a_text(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["mlx", "sample:", "--damp", "0.1", "-o", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "--damp has no effect without --calib" in done.stderr
