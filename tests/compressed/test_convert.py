"""The flow of `dsconvert compressed`: GPTQ's codes in another folder, proven, resumed, refused by name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.compressed import convert as flow
from converters.compressed.convert import convert
from converters.compressed.plan import prepare
from converters.compressed.reader import open_model
from converters.gptq.convert import convert as gptq
from converters.gptq.reader import open_model as open_gptq
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Planned, Warn
from dsconvert.models.config import load_json
from dsconvert.quantization.run_state import state_folder

SMALL: dict[str, Any] = {"calib": "builtin", "calib_samples": 4, "calib_len": 128, "group_size": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("compressed") / "model", layers=3, bias=True)


def asked(**more: Any) -> dict[str, Any]:
    return {**SMALL, "effort": "off", **more}


def run(model: Path | str, out: Path, **more: Any) -> list[Event]:
    return list(convert(calibrated.compressed_options(model, out=out, **asked(**more))))


def failed(events: list[Event]) -> list[str]:
    checks = [event for event in events if isinstance(event, Check)]
    assert len(checks) >= 5
    return [check.detail for check in checks if not check.passed]


def test_the_sample_is_quantized_proven_and_known_to_every_command(tmp_path: Path) -> None:
    out, text = tmp_path / "out", ["--calib", "builtin", "--calib-samples", "8", "--calib-len", "128"]
    done = CliRunner().invoke(cli, ["compressed", "sample:", *text, "--json", "-o", str(out)])
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    checks = {e["name"]: e for e in events if e["event"] == "check"}
    assert {"structure", "tokenizer", "weights", "mean KLD", "PPL ratio"} <= checks.keys()
    assert 0 < checks["mean KLD"]["value"] < 0.02
    for words in (
        ["verify", str(out), "--against", "sample:"],
        ["compare", str(out), "--against", "sample:"],
    ):
        told = CliRunner().invoke(cli, words)
        assert told.exit_code == 0, told.output
        assert "w4a16-128g" in told.output
    assert not state_folder(out).exists()


@pytest.mark.parametrize(("bits", "sym"), [(2, True), (3, False), (4, True), (4, False), (8, True)])
def test_the_weights_are_those_of_the_gptq_folder(tmp_path: Path, model: Path, bits: int, sym: bool) -> None:
    same: dict[str, Any] = {"sym": sym, "rounds": int(bits == 3)}
    run(model, tmp_path / "a", scheme=f"w{bits}a16", **same)
    list(gptq(calibrated.gptq_options(model, out=tmp_path / "b", **asked(bits=bits, **same))))
    ours, theirs = open_model(tmp_path / "a"), open_gptq(tmp_path / "b")
    assert ours.shapes() == theirs.shapes()
    assert len(ours.linears) == 21
    for name in ours.shapes():
        np.testing.assert_array_equal(ours.float32(name), theirs.float32(name), err_msg=name)


@pytest.mark.parametrize("scheme", ["w2a16", "w5a16", "w6a16"])  # the others are GPTQ's, which has its own
def test_every_scheme_passes_its_verdict_and_is_planned_to_the_byte(tmp_path: Path, scheme: str) -> None:
    sym = scheme != "w5a16"
    events = run("sample:", tmp_path / "out", effort="quick", scheme=scheme, group_size=-1, sym=sym)
    assert failed(events) == []
    (planned,) = (e for e in events if isinstance(e, Planned))
    stored = open_model(tmp_path / "out").checkpoint.tensors.values()
    assert planned.nbytes == (sum(tensor.nbytes for tensor in stored),)
    assert sum(row.nbytes for row in planned.tensors) == planned.nbytes[0]
    settings = load_json(tmp_path / "out" / "config.json")["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"] == {
        "num_bits": int(scheme[1]), "type": "int", "symmetric": sym, "strategy": "channel",
        "group_size": None, "dynamic": False,
    }  # fmt: skip
    assert (settings["format"], settings["ignore"]) == ("pack-quantized", ["lm_head"])
    assert settings["meta"]["calibration"]["text"] == "builtin"


def test_the_verdict_is_about_the_weights_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes of other outputs are found out when the folder is read back."""
    right = flow.packed_of

    def wrong(*arguments: Any) -> Any:
        parts = right(*arguments)
        return {**parts, "weight_packed": np.roll(parts["weight_packed"], 1, axis=0)}

    monkeypatch.setattr(flow, "packed_of", wrong)
    assert any("weight" in why for why in failed(run("sample:", tmp_path / "out", effort="quick")))


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = calibrated.stopper(monkeypatch)
    run(model, tmp_path / "whole", sym=False)
    stopped(lambda: run(model, tmp_path / "out", sym=False), tmp_path / "out", 2)
    with pytest.raises(CheckpointError, match="another options"):
        run(model, tmp_path / "out", resume=True)
    run(model, tmp_path / "out", resume=True, sym=False)
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")


@pytest.mark.slow
def test_kill_at_random_moments_and_resume(tmp_path: Path) -> None:
    small = tiny.tiny_checkpoint(tmp_path / "model", layers=4, d=128, ff=352)
    settings = {"scheme": "w3a16", "group_size": 32}
    assert calibrated.killed_and_resumed("compressed", small, tmp_path, 6, **settings) >= 1


def test_shapes_and_settings_are_refused_by_name(tmp_path: Path, model: Path) -> None:
    narrow = tiny.tiny_checkpoint(tmp_path / "narrow", ff=176)
    with pytest.raises(QuantizationError, match="multiple of 32") as caught:
        run(narrow, tmp_path / "out")
    assert "mlp.down_proj.weight" in str(caught.value)
    with pytest.raises(QuantizationError, match="multiple of the group size"):
        run(model, tmp_path / "out", group_size=128)
    with pytest.raises(UsageError, match="groups of 48"):
        run(model, tmp_path / "out", group_size=48)
    with pytest.raises(UsageError, match="'w7a16' is not known"):
        run(model, tmp_path / "out", scheme="w7a16")
    assert list(tmp_path.iterdir()) == [narrow]


def test_runtimes_that_will_not_read_it_are_named(tmp_path: Path, model: Path) -> None:
    events = run(model, tmp_path / "out", scheme="w3a16", sym=False)
    warned = " ".join(e.text for e in events if isinstance(e, Warn))
    for said in ("sglang will not read this: 4 or 8 bits", "transformers reads this with Compressed"):
        assert said in warned


def test_the_folder_is_named_after_the_settings(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = prepare(calibrated.compressed_options(model, scheme="w3a16", group_size=32, sym=False))
    assert job.out == tmp_path / "model-w3a16-32g-asym"


def test_the_head_is_quantized_where_asked(tmp_path: Path) -> None:
    events = run("sample:", tmp_path / "out", effort="quick", lm_head=True, group_size=128)
    assert failed(events) == []
    assert open_model(tmp_path / "out").dtype("lm_head.weight") == "w4a16"
    assert load_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"] == []


def test_a_head_that_is_the_embedding_is_ignored_by_name(tmp_path: Path) -> None:
    tied = tiny.tiny_checkpoint(tmp_path / "tied", tied=True)
    run(tied, tmp_path / "out")
    assert load_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"] == ["lm_head"]


@pytest.mark.parametrize("language_only", [False, True])
def test_a_model_with_a_tower(tmp_path: Path, language_only: bool) -> None:
    """Whole, or its language model as a plain Llama folder; the tower stays as it is, and is ignored."""
    events = run("sample-vl:", tmp_path / "out", effort="quick", language_only=language_only)
    assert failed(events) == []
    config, read = load_json(tmp_path / "out" / "config.json"), open_model(tmp_path / "out")
    source = open_checkpoint("sample-vl:")
    towers = [name for name in source.shapes() if "vision" in name or "aligner" in name]
    ignored = config["quantization_config"]["ignore"]
    if language_only:
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert not set(towers) & read.shapes().keys()
        assert ignored == ["lm_head"]
        return
    assert all((read.checkpoint.tensors[name].data == source.tensors[name].data).all() for name in towers)
    taken = [target.removeprefix("re:") for target in ignored if target.startswith("re:")]
    linears = [name.removesuffix(".weight") for name in towers if len(source.shapes()[name]) == 2]
    assert linears
    assert all(any(re.match(pattern, name) for pattern in taken) for name in linears)
    assert not any(re.match(pattern, name) for pattern in taken for name in read.linears)


@pytest.mark.parametrize("options", ["--bits 3", "--bits 2", "--asym"])
def test_gptq_names_this_as_the_way_to_vllm(tmp_path: Path, model: Path, options: str) -> None:
    text = ["--calib", "builtin", "--calib-samples", "4", "--calib-len", "64", "-g", "32", "--effort", "off"]
    done = CliRunner().invoke(cli, ["gptq", str(model), *options.split(), *text, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    wanted = {"--bits 3": "w3a16", "--bits 2": "w2a16", "--asym": "w4a16 --asym"}[options]
    said = " ".join(done.stderr.split())
    assert f"for vLLM: dsconvert compressed MODEL_PATH --scheme {wanted}" in said
