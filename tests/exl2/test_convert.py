"""The flow of `dsconvert exl2`: end to end on the sample, refusals, resume, reuse, what the folder says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
import tiny_vl
from click.testing import CliRunner

from converters.exl2 import backend, measure
from converters.exl2.convert import convert
from converters.exl2.reader import open_model, per_weight
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.safetensors_reader import read_safetensors
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, OutputError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Finished, Planned, Step
from dsconvert.models.config import load_json
from dsconvert.quantization.run import LinearSolved
from dsconvert.quantization.run_state import state_folder

SMALL: dict[str, Any] = {"calib": "builtin", "calib_samples": 4, "calib_len": 128, "bpw": 5.0}

Stopped = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("exl2") / "model", layers=3, d=128, ff=352, bias=True)


def run(model: Path | str, out: Path, **asked: Any) -> list[Event]:
    return list(convert(calibrated.exl2_options(model, out=out, **{**SMALL, "effort": "off", **asked})))


def test_the_sample_is_quantized_and_passes_its_verdict(tmp_path: Path) -> None:
    command = ["exl2", "sample:", "--bpw", "4", "--calib", "builtin", "--calib-samples", "8"]
    out = tmp_path / "out"
    done = CliRunner().invoke(cli, [*command, "--calib-len", "512", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    checks = {e["name"]: e for e in events if e["event"] == "check"}
    assert {"structure", "bits per weight", "tokenizer", "weights", "mean KLD", "PPL ratio"} <= checks.keys()
    assert all(check["passed"] for check in checks.values())
    assert abs(checks["bits per weight"]["value"] - 4) <= 0.01
    assert 0 < checks["mean KLD"]["value"] < 0.01
    solved = [e for e in events if e["event"] == "linearsolved"]
    assert len(solved) == 15
    assert all(e["loss"] < e["rtn_loss"] and e["fell_back"] is None for e in solved)
    (planned,) = (e for e in events if e["event"] == "planned")
    (finished,) = (e for e in events if e["event"] == "finished")
    assert planned["nbytes"] == [finished["nbytes"]]
    assert not state_folder(out).exists()
    verified = CliRunner().invoke(
        cli, ["verify", str(out), "--against", "sample:", "--windows", "1", "--json", "-"]
    )
    assert verified.exit_code == 0, verified.output


def test_what_is_asked_stands_in_the_folder(tmp_path: Path, model: Path) -> None:
    run(model, tmp_path / "out", head_bits=5)
    config = load_json(tmp_path / "out" / "config.json")
    stated = config["quantization_config"]
    assert (stated["quant_method"], stated["bits"], stated["head_bits"]) == ("exl2", 5.0, 5)
    assert stated["calibration"] == {"rows": 4, "length": 128, "dataset": "builtin"}
    assert config["rope_theta"] == 10000.0
    assert config["torch_dtype"] == "float16"
    assert str(model) not in json.dumps(stated)
    read, source = open_model(tmp_path / "out"), open_checkpoint(model)
    assert read.shapes() == source.shapes()
    assert per_weight(read) == pytest.approx(5.0, abs=0.01)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert read.dtype(name) == "f16"
        expected = source.float32(name).astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(read.float32(name), expected)
    for name in read.linears:
        a, b = read.float32(f"{name}.weight"), source.float32(f"{name}.weight")
        assert np.square(a - b).sum() < 0.5 * np.square(b).sum(), name  # 2 bits where that costs little


def test_a_tied_head_becomes_one_of_its_own_or_stays(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", d=128, ff=352, tied=True)
    run(model, tmp_path / "six")
    assert load_json(tmp_path / "six" / "config.json")["tie_word_embeddings"] is False
    six = open_model(tmp_path / "six")
    assert "lm_head" in six.linears
    assert "model.embed_tokens.weight" in six.shapes()
    run(model, tmp_path / "whole", head_bits=16)
    assert load_json(tmp_path / "whole" / "config.json")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in open_model(tmp_path / "whole").shapes()


def test_a_measurement_serves_other_bit_rates(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.json"
    run(model, tmp_path / "first", measurement=path)
    assert load_json(tmp_path / "first" / "measurement.json") == load_json(path)

    def never(*rest: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "measure_linear", never)
    run(model, tmp_path / "again", measurement=path)
    assert calibrated.digests(tmp_path / "again") == calibrated.digests(tmp_path / "first")
    run(model, tmp_path / "other", measurement=tmp_path / "first" / "measurement.json", bpw=3.5)
    assert per_weight(open_model(tmp_path / "other")) == pytest.approx(3.5, abs=0.01)


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Stopped:
    """Runs a conversion until so many blocks are saved."""
    stop = calibrated.stopper(monkeypatch)
    return lambda model, out, after, **asked: stop(lambda: run(model, out, **asked), out, after)


@pytest.mark.parametrize("after", [0, 2, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, stopped: Stopped, after: int
) -> None:
    run(model, tmp_path / "good")
    stopped(model, tmp_path / "out", after)
    events = run(model, tmp_path / "out", resume=True)
    solved = {e.name.split(".")[2] for e in events if isinstance(e, LinearSolved) and "layers" in e.name}
    assert solved == {str(index) for index in range(after, 3)}
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "good")
    assert not state_folder(tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"bpw": 4.5}, {"calib_samples": 3}, {"damp": 0.1}, {"head_bits": 8}])
def test_another_run_is_not_gone_on_with(
    tmp_path: Path, model: Path, stopped: Stopped, change: dict[str, Any]
) -> None:
    stopped(model, tmp_path / "out", 1)
    with pytest.raises(CheckpointError, match="was begun with another"):
        run(model, tmp_path / "out", resume=True, **change)
    with pytest.raises(OutputError, match="unfinished run"):
        run(model, tmp_path / "out")


def test_a_rate_that_cannot_be_met_is_refused_before_any_work(tmp_path: Path, model: Path) -> None:
    with pytest.raises(UsageError, match=r"2\.1 bits per weight cannot be met") as raised:
        run(model, tmp_path / "out", bpw=2.1)
    assert "Give --bpw a value from" in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_shapes_that_the_runtime_cannot_run_are_refused_before_any_work(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", d=80, ff=160)
    with pytest.raises(QuantizationError, match="inputs are a multiple of 32") as raised:
        run(model, tmp_path / "out")
    assert "model.layers.0" in str(raised.value)


@pytest.mark.parametrize("layout", ["transformers", "original"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_of_a_model_with_towers_they_are_written_beside(tmp_path: Path, layout: Any, hybrid: bool) -> None:
    source = tiny_vl.vl_checkpoint(tmp_path / "model", tiny_vl.VL(hybrid=hybrid, d=128, ff=352), layout)
    out = tmp_path / "out"
    events = run(source, out, effort="full", bpw=6.0)
    checks = {e.name: e.passed for e in events if isinstance(e, Check)}
    assert len(checks) == 13
    assert all(checks.values()), checks
    config = load_json(out / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rope_theta"] == 10000.0
    stored, beside = open_checkpoint(source).tensors, read_safetensors(out / "vision" / "model.safetensors")
    towers = {n for n in stored if "language_model" not in n and n != "lm_head.weight"}
    assert beside.keys() == towers
    for name, tensor in beside.items():
        assert tensor.dtype == stored[name].dtype
        assert (tensor.data == stored[name].data).all()
    (planned,) = (e for e in events if isinstance(e, Planned))
    (finished,) = (e for e in events if isinstance(e, Finished))
    assert planned.nbytes == (finished.nbytes,)


def test_values_beyond_float16_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", d=128, ff=352, layers=1)
    tensors = tiny.tiny_tensors(tiny.Tiny(d=128, ff=352, layers=1))
    tensors["model.embed_tokens.weight"][500, 0] = 1e5
    data = {name: tiny.encode(value, "bf16") for name, value in tensors.items()}
    (model / "model.safetensors").write_bytes(tiny.safetensors_bytes(data))
    with pytest.raises(QuantizationError, match=r"embed_tokens\.weight: holds values that float16 cannot"):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_defaults_are_the_current_folder_and_a_name_of_the_settings(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    command = ["exl2", "--bpw", "6", "--calib", "builtin", "--calib-samples", "2", "--calib-len", "64"]
    done = CliRunner().invoke(cli, [*command, "--verify", "off", "--quiet"])
    assert done.exit_code == 0, done.output
    assert (model / "model-exl2-6.0bpw" / "output.safetensors").exists()


def test_the_other_backend_says_what_it_needs(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        cli, ["exl2", "sample:", "--backend", "exllamav2", "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 2
    assert "needs the package exllamav2" in done.output
    assert "Leave --backend out" in done.output


def test_the_other_backend_is_driven_and_its_failure_told(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for exllamav2's converter: once it fails, once it writes the folder that it is told to."""
    package = tmp_path / "site" / "exllamav2" / "conversion"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("")
    run(model, tmp_path / "ours")
    script = package / "convert_exl2.py"
    script.write_text("import sys\nprint('out of memory at layer 2')\nsys.exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setattr(backend, "check_installed", lambda: None)
    options = calibrated.exl2_options(model, out=tmp_path / "theirs", **{**SMALL, "effort": "off"})
    config = load_json(model / "config.json")
    rope = {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default"}}
    tiny.write_json(model / "config.json", config | rope)
    with pytest.raises(ConversionError, match="rope_theta"):
        list(backend.convert(options))  # the checkpoint has the new RoPE keys only
    tiny.write_json(model / "config.json", config)
    monkeypatch.setattr(backend, "check_readable", lambda job: None)
    with pytest.raises(ConversionError, match="out of memory at layer 2"):
        list(backend.convert(options))
    assert not (tmp_path / "theirs").exists()
    script.write_text(
        "import shutil, sys\na = dict(zip(sys.argv[1:-1:2], sys.argv[2::2]))\n"
        f"assert a['-b'] == '5.0' and a['-hb'] == '6' and a['-i'] == {str(model)!r}, a\n"
        f"shutil.copytree({str(tmp_path / 'ours')!r}, a['-cf'])\n"
    )
    events = list(backend.convert(options))
    assert isinstance(events[-2], Finished)
    assert events[-1] == Step("verification is off: the folder was not read back")
    assert calibrated.digests(tmp_path / "theirs") == calibrated.digests(tmp_path / "ours")
    assert config == load_json(model / "config.json")
