"""The flow of `dsconvert gptq`: end to end on the sample, refusals, resume, what the folder says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.gptq import convert as flow
from converters.gptq.convert import convert
from converters.gptq.plan import prepare
from converters.gptq.reader import open_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, ConversionError, OutputError, QuantizationError, UsageError
from dsconvert.events import Check, Event, Finished, Planned, Warn
from dsconvert.models.config import load_config, load_json
from dsconvert.quantization.run import LinearSolved
from dsconvert.quantization.run_state import state_folder

SMALL: dict[str, Any] = {"calib": "builtin", "calib_samples": 4, "calib_len": 128, "group_size": 32}

Stopped = Callable[..., None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("gptq") / "model", layers=3, bias=True)


def run(model: Path | str, out: Path, **asked: Any) -> list[Event]:
    return list(convert(calibrated.gptq_options(model, out=out, **{**SMALL, "effort": "off", **asked})))


def test_the_sample_is_quantized_and_passes_its_verdict(tmp_path: Path) -> None:
    command = ["gptq", "sample:", "--bits", "4", "--calib", "builtin", "--calib-samples", "8", "--json"]
    done = CliRunner().invoke(cli, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    checks = {e["name"]: e for e in events if e["event"] == "check"}
    assert {"structure", "tokenizer", "weights", "mean KLD", "PPL ratio"} <= checks.keys()
    assert all(check["passed"] for check in checks.values())
    assert 0 < checks["mean KLD"]["value"] < 0.02
    solved = [e for e in events if e["event"] == "linearsolved"]
    assert len(solved) == 14
    assert all(e["loss"] < e["rtn_loss"] and e["fell_back"] is None for e in solved)
    steps = [(at, e["text"]) for at, e in enumerate(events) if e["event"] == "step"]
    (told,) = (at for at, text in steps if " for 2 blocks by this machine's speed" in text)
    assert told < events.index(solved[0])
    assert next(text for _, text in steps if text.startswith("block 1")).endswith(" left")
    (planned,) = (e for e in events if e["event"] == "planned")
    (finished,) = (e for e in events if e["event"] == "finished")
    assert planned["nbytes"] == [finished["nbytes"]]
    assert not state_folder(tmp_path / "out").exists()


def test_the_verdict_is_about_the_weights_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A solver that returns the codes of another linear is found out when the folder is read back."""
    right = flow.packed_of

    def wrong(solved: Any, bits: int) -> Any:
        packed = right(solved, bits)
        packed.qweight[:] = np.roll(packed.qweight, 1, axis=1)
        return packed

    monkeypatch.setattr(flow, "packed_of", wrong)
    events = run("sample:", tmp_path / "out", effort="quick", group_size=128)
    assert any(isinstance(e, Check) and not e.passed for e in events)


@pytest.mark.parametrize(
    ("asked", "settings"),
    [
        ({"bits": 3}, {"bits": 3, "group_size": 32, "desc_act": False, "sym": True}),
        ({"bits": 8, "group_size": -1}, {"bits": 8, "group_size": -1, "desc_act": False}),
        ({"dynamic_groups": True}, {"bits": 4, "desc_act": True}),
        (
            {"sym": False, "mse": False, "act_order": False, "damp": 0.05, "rounds": 2},
            {"sym": False, "damp_percent": 0.05},
        ),
    ],
)
def test_what_is_asked_stands_in_the_folder(
    tmp_path: Path, model: Path, asked: dict[str, Any], settings: dict[str, Any]
) -> None:
    events = run(model, tmp_path / "out", **asked)
    stated = load_json(tmp_path / "out" / "config.json")["quantization_config"]
    assert settings.items() <= stated.items()
    assert stated == load_json(tmp_path / "out" / "quantize_config.json")
    assert stated["meta"]["calibration"]["tokens"] == 4 * 128
    by_bits = int(asked.get("bits", 4) <= 3)  # what is not asked for
    assert stated["meta"].get("rounds", 0) == asked.get("rounds", by_bits)
    assert str(model) not in json.dumps(stated)
    read, source = open_model(tmp_path / "out"), open_checkpoint(model)
    assert read.shapes() == source.shapes()
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert (read.checkpoint.tensors[name].data == source.tensors[name].data).all()
        assert read.dtype(name) == "bf16"
    for event in events:
        if isinstance(event, LinearSolved):  # the folder's weights are near the source's
            error = read.float32(event.name) - source.float32(event.name)
            assert np.square(error).sum() < 0.3 * np.square(source.float32(event.name)).sum()


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Stopped:
    """Runs a conversion until so many blocks are saved."""
    stop = calibrated.stopper(monkeypatch)
    return lambda model, out, after, **asked: stop(lambda: run(model, out, **asked), out, after)


@pytest.mark.parametrize("asked", [{}, {"dynamic_groups": True, "bits": 3, "rounds": 1}])
def test_a_resumed_run_gives_the_same_bytes(
    tmp_path: Path, model: Path, stopped: Stopped, asked: dict[str, Any]
) -> None:
    run(model, tmp_path / "whole", **asked)
    stopped(model, tmp_path / "out", 2, **asked)
    events = run(model, tmp_path / "out", resume=True, **asked)
    solved = {e.name.split(".")[2] for e in events if isinstance(e, LinearSolved)}
    assert solved == {"2"}, "finished blocks are not solved again"
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")
    assert not state_folder(tmp_path / "out").exists()


def test_resume_refuses_another_run(tmp_path: Path, model: Path, stopped: Stopped) -> None:
    stopped(model, tmp_path / "out", 1)
    other = tiny.tiny_checkpoint(tmp_path / "other", layers=3, bias=True, seed=1)
    for source, asked, named in (
        (other, {}, "another model"),
        (model, {"bits": 8}, "another options"),
        (model, {"damp": 0.02}, "another options"),
        (model, {"seed": 1}, "another calibration"),
        (model, {"calib_samples": 5}, "another calibration"),
    ):
        with pytest.raises(CheckpointError, match=named):
            run(source, tmp_path / "out", resume=True, **asked)
    run(model, tmp_path / "out", resume=True)


def test_an_unfinished_run_is_not_thrown_away_unasked(tmp_path: Path, model: Path, stopped: Stopped) -> None:
    stopped(model, tmp_path / "out", 1)
    with pytest.raises(OutputError, match=r"an unfinished run was left here.*--resume"):
        run(model, tmp_path / "out")
    run(model, tmp_path / "out", force=True, seed=3)
    assert (tmp_path / "out").exists()


def test_a_block_that_was_damaged_is_not_taken(tmp_path: Path, model: Path, stopped: Stopped) -> None:
    stopped(model, tmp_path / "out", 2)
    block = state_folder(tmp_path / "out") / "block-00001.safetensors"
    data = bytearray(block.read_bytes())
    data[-5] ^= 4
    block.write_bytes(data)
    with pytest.raises(OutputError, match=r"block-00001.safetensors: is not as it was written"):
        run(model, tmp_path / "out", resume=True)
    block.with_suffix(".json").unlink()
    run(model, tmp_path / "out", resume=True)
    run(model, tmp_path / "whole")
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")


def test_shapes_are_refused_before_any_work(tmp_path: Path) -> None:
    odd = tiny.tiny_checkpoint(tmp_path / "odd", d=64, ff=144)
    with pytest.raises(QuantizationError, match=r"0.mlp.down_proj.weight: breaks a rule of format: inputs"):
        next(iter(convert(calibrated.gptq_options(odd, out=tmp_path / "out", **SMALL))))
    assert not (tmp_path / "out").exists()
    assert not state_folder(tmp_path / "out").exists()


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path, model: Path) -> None:
    run(model, tmp_path / "out")
    before = calibrated.digests(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        next(iter(convert(calibrated.gptq_options(model, out=tmp_path / "out", **SMALL))))
    assert calibrated.digests(tmp_path / "out") == before
    run(model, tmp_path / "out", force=True, bits=8)
    assert {one.type for one in open_model(tmp_path / "out").linears.values()} == {"gptq8"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no text"),
        ("  \n", "holds no text"),
        ("x", r"has [12] tokens?, 4 windows of 128 need 512"),
        ("a text that is too short", r"windows of 128 need 512.*(ask for less|Give more text)"),
        ("a" * 100_000, "nothing can be learnt from it"),
    ],
    ids=["empty", "blank", "one byte", "short", "one token"],
)
def test_a_calibration_text_of_no_use_is_refused(
    tmp_path: Path, model: Path, content: str, said: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(content, "utf-8")
    with pytest.raises(UsageError, match=said):
        run(model, tmp_path / "out", calib=str(text))
    assert not (tmp_path / "out").exists()
    assert not state_folder(tmp_path / "out").exists()


def test_weights_that_give_nan_are_refused_by_name(tmp_path: Path) -> None:
    broken = tiny.tiny_checkpoint(tmp_path / "broken", dtype="f32", format="bin")
    tensors = tiny.tiny_tensors(tiny.Tiny(dtype="f32"))
    tensors["model.layers.0.input_layernorm.weight"][:] = np.inf
    tiny.write_bin(broken / "pytorch_model.bin", tensors)
    with pytest.raises(QuantizationError, match=r"layers.0.self_attn.q_proj.weight: is given inputs"):
        run(broken, tmp_path / "out")
    tensors = tiny.tiny_tensors(tiny.Tiny(dtype="f32"))
    tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = np.nan
    tiny.write_bin(broken / "pytorch_model.bin", tensors)
    with pytest.raises(QuantizationError, match=r"layers.1.mlp.up_proj.weight: has weights that are no"):
        run(broken, tmp_path / "out")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"dynamic_groups": True, "act_order": False}, "--act-order"),
        ({"calib_chat": Path("no-such-file.jsonl")}, "no-such-file"),
        ({"calib": "c5"}, "neither a known text"),
        ({"damp": 2.0, "device": "tpu"}, "device"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, model: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConversionError, match=said):
        run(model, tmp_path / "out", **asked)


def test_runtimes_that_will_not_read_it_are_named(tmp_path: Path, model: Path) -> None:
    events = run(model, tmp_path / "out", bits=3)
    warned = " ".join(e.text for e in events if isinstance(e, Warn))
    assert "vllm will not read this: 4 or 8 bits only" in warned
    assert "exllamav2 will not read this: 4 bits only" in warned


def test_offline_takes_the_builtin_text_and_says_so(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    events = run(model, tmp_path / "out", calib="c4", offline=True)
    assert any(isinstance(e, Warn) and "the built-in text is used" in e.text for e in events)
    stated = load_json(tmp_path / "out" / "config.json")["quantization_config"]["meta"]["calibration"]
    assert stated["text"] == "builtin"
    assert stated["notes"]


def test_the_folder_is_named_after_the_settings(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = calibrated.gptq_options(model, **{**SMALL, "bits": 3, "effort": "off"})
    (finished,) = (e for e in convert(options) if isinstance(e, Finished))
    assert finished.path == str(tmp_path / "model-gptq-3bit-32g")


def test_a_model_of_the_hub_gives_its_name_and_not_its_commit(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--deepseek-ai--some-model" / "snapshots" / ("0" * 40)
    shutil.copytree(model, snapshot)
    monkeypatch.chdir(tmp_path)
    assert prepare(calibrated.gptq_options(snapshot, **SMALL)).out == tmp_path / "some-model-gptq-4bit-32g"


def test_without_a_path_the_current_folder_is_taken(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the README has it: `dsconvert gptq --bits 4 --calib builtin` in a model's folder."""
    shutil.copytree(model, tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    small = ["--calib-samples", "4", "--calib-len", "64", "-g", "32", "--verify", "off"]
    done = CliRunner().invoke(cli, ["gptq", "--bits", "4", "--calib", "builtin", *small])
    assert done.exit_code == 0, done.output
    read = open_model(tmp_path / "mine" / "mine-gptq-4bit-32g")
    assert {one.type for one in read.linears.values()} == {"gptq4"}
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["gptq", "--bits", "4", "--calib", "builtin", *small])
    assert done.exit_code == 2
    assert "No model is given and this folder holds no config.json" in done.output


def test_the_plan_is_exact(tmp_path: Path, model: Path) -> None:
    events = run(model, tmp_path / "out", bits=2)
    (planned,) = (e for e in events if isinstance(e, Planned))
    stored = open_model(tmp_path / "out").checkpoint.tensors.values()
    assert planned.nbytes == (sum(tensor.nbytes for tensor in stored),)
    assert sum(row.nbytes for row in planned.tensors) == planned.nbytes[0]
    assert load_config(tmp_path / "out").layers == 3


@pytest.mark.parametrize(("bits", "rounds"), [(2, 1), (8, 0)])
def test_a_faithful_result_passes_at_every_width(tmp_path: Path, bits: int, rounds: int) -> None:
    events = run("sample:", tmp_path / "out", effort="quick", bits=bits, rounds=rounds, group_size=-1)
    checks = [e for e in events if isinstance(e, Check)]
    assert len(checks) >= 5
    assert [check.detail for check in checks if not check.passed] == []


def test_the_head_is_quantized_where_asked(tmp_path: Path, model: Path, stopped: Stopped) -> None:
    """After the last block, on what the final norm gives; read back, judged, and resumed as a block is."""
    events = run("sample:", tmp_path / "sample", effort="quick", lm_head=True, group_size=128)
    assert all(e.passed for e in events if isinstance(e, Check))
    assert load_json(tmp_path / "sample" / "config.json")["quantization_config"]["lm_head"] is True
    read, source = open_model(tmp_path / "sample"), open_checkpoint("sample:")
    assert read.shapes() == source.shapes()
    assert read.dtype("lm_head.weight") == "gptq4"
    assert read.dtype("model.embed_tokens.weight") == "bf16"
    (head,) = (e for e in events if isinstance(e, LinearSolved) and e.name == "lm_head.weight")
    assert 0 < head.loss < head.rtn_loss
    error = np.square(read.float32("lm_head.weight") - source.float32("lm_head.weight")).sum()
    assert error < 0.03 * np.square(source.float32("lm_head.weight")).sum()
    warned = " ".join(e.text for e in events if isinstance(e, Warn))
    assert "transformers will not read this: it takes the head in 16 bits only" in warned
    run(model, tmp_path / "whole", lm_head=True)
    stopped(model, tmp_path / "out", 3, lm_head=True)
    with pytest.raises(CheckpointError, match="another options"):
        run(model, tmp_path / "out", resume=True)
    events = run(model, tmp_path / "out", resume=True, lm_head=True)
    assert [e.name for e in events if isinstance(e, LinearSolved)] == ["lm_head.weight"]
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")


def test_a_head_that_is_the_embedding_is_refused(tmp_path: Path) -> None:
    tied = tiny.tiny_checkpoint(tmp_path / "tied", tied=True)
    with pytest.raises(UsageError, match="no head of its own"):
        run(tied, tmp_path / "out", lm_head=True)


@pytest.mark.parametrize("language_only", [False, True])
def test_the_head_of_a_model_with_a_tower(tmp_path: Path, language_only: bool) -> None:
    run("sample-vl:", tmp_path / "out", lm_head=True, language_only=language_only, bits=8)
    read = open_model(tmp_path / "out")
    assert read.dtype("lm_head.weight") == "gptq8"
    assert len(read.linears) == 15


@pytest.mark.parametrize("language_only", [False, True])
def test_a_model_with_a_tower(tmp_path: Path, language_only: bool) -> None:
    """Whole, or its language model as a plain Llama folder; the tower stays as it is."""
    out = tmp_path / "out"
    events = run("sample-vl:", out, effort="quick", language_only=language_only)
    assert all(e.passed for e in events if isinstance(e, Check))
    config, read = load_json(out / "config.json"), open_model(out)
    source = open_checkpoint("sample-vl:")
    assert config["quantization_config"]["bits"] == 4
    towers = [name for name in source.shapes() if "vision" in name or "aligner" in name]
    assert towers
    if language_only:
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert not set(towers) & read.shapes().keys()
        assert "model.layers.0.mlp.up_proj.weight" in read.shapes()
        return
    assert config["architectures"] == load_json(source.folder / "config.json")["architectures"]
    assert read.shapes() == source.shapes()
    assert all((read.checkpoint.tensors[name].data == source.tensors[name].data).all() for name in towers)
