"""What the converter drops of config.json shows in every proof: both sides do not share its reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import calibrated
import pytest
import tiny
import tiny_vl
from click.testing import CliRunner, Result

import dsconvert.checkpoints.checkpoint
import dsconvert.models.config
from converters.exl2.backend import check_readable
from converters.exl2.plan import Job as Exl2Job
from converters.gptq.convert import convert
from dsconvert.checkpoints import output_folder
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import UsageError
from dsconvert.events import Check, Event, Warn
from dsconvert.models.config import ModelConfig, load_json
from dsconvert.models.rope import RopeScaling

pytest.importorskip("torch")
SAMPLE = Path(__file__).parents[2] / "dsconvert" / "sample"
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
BETAS = {**YARN, "beta_fast": 8.0, "beta_slow": 4.0, "truncate": False}
SMALL: dict[str, Any] = {"calib": "builtin", "calib_samples": 2, "calib_len": 64, "group_size": 32}


def scaling(config: ModelConfig) -> RopeScaling:
    assert config.rope_scaling is not None
    return config.rope_scaling


# What the normalised view may lose, and what the failed check says.
DROPPED: dict[str, tuple[Callable[[ModelConfig], ModelConfig], str]] = {
    "all of rope_scaling": (lambda config: replace(config, rope_scaling=None), "RoPE scaling is default"),
    "mscale": (
        lambda config: replace(config, rope_scaling=replace(scaling(config), attention_factor=None)),
        "RoPE's attention factor is 1.13863, the reference has 1",
    ),
    "original_max_position_embeddings": (
        lambda config: replace(config, rope_scaling=replace(scaling(config), original_context=None)),
        "RoPE scaling is RopeScaling(type='yarn'",
    ),
    "rope_theta": (lambda config: replace(config, rope_theta=10000.0), "rope_theta is 10000.0"),
    "rms_norm_eps": (lambda config: replace(config, norm_eps=1e-3), "norm_eps is 0.001"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rope") / "model"
    shutil.copytree(SAMPLE, out)
    raw = json.loads((out / "config.json").read_text("utf-8"))
    raw = {key: value for key, value in raw.items() if not key.startswith("rope")}
    raw |= {"rope_theta": 50000.0, "rope_scaling": YARN}
    (out / "config.json").write_text(json.dumps(raw), "utf-8")
    return out


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def dropping(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    whole = dsconvert.models.config.normalise
    for module in (dsconvert.models.config, dsconvert.checkpoints.checkpoint):
        monkeypatch.setattr(module, "normalise", lambda raw, where: DROPPED[what][0](whole(raw, where)))


@pytest.mark.parametrize("what", DROPPED)
def test_what_the_converter_drops_fails_every_proof(
    what: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"
    dropping(monkeypatch, what)
    for options in ((), ("--verify", "full", "--force")):  # numpy's reading, transformers' own
        made = command("gguf", model, "-q", "f32", "-o", out, *options)
        assert made.exit_code == 3, made.output
        assert DROPPED[what][1] in made.stderr
    ask = ("verify", out, "--against", model, "--windows", 1, "--length", 128)
    for effort in ("quick", "full"):
        found = command(*ask, "--effort", effort)
        assert found.exit_code == 3, found.output
        assert DROPPED[what][1] in found.stderr
    monkeypatch.undo()
    assert command(*ask).exit_code == 3  # nor does it pass with a reader that drops nothing


def test_a_faithful_file_of_the_same_config_passes(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    for options in ((), ("--verify", "full", "--force")):
        made = command("gguf", model, "-q", "f32", "-o", out, *options)
        assert made.exit_code == 0, made.output
    found = command("verify", out, "--against", model, "--windows", 1, "--length", 128, "--json", "-")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["figures"]["kld"]["value"] < 1e-9


def quantized(tmp_path: Path, rope: dict[str, Any]) -> list[Event]:
    source = tiny.tiny_checkpoint(tmp_path / "model", layers=1)
    raw = {key: value for key, value in load_json(source / "config.json").items() if key[:4] != "rope"}
    (source / "config.json").write_text(json.dumps(raw | rope), "utf-8")
    return list(convert(calibrated.gptq_options(source, out=tmp_path / "out", **SMALL)))


def failed(events: list[Event]) -> list[str]:
    return [event.detail for event in events if isinstance(event, Check) and not event.passed]


def test_a_folder_keeps_what_a_file_cannot_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rope = {"rope_scaling": BETAS, "rope_theta": 50000.0}
    events = quantized(tmp_path / "kept", rope)
    assert any(isinstance(event, Check) for event in events)
    assert not [text for text in failed(events) if "RoPE" in text or "attention" in text]
    written = load_json(tmp_path / "kept" / "out" / "config.json")
    kept = {key: value for key, value in BETAS.items() if key != "rope_type"}
    assert written["rope_parameters"] == {"rope_type": "yarn", "rope_theta": 50000.0, **kept}
    assert written["rope_scaling"] == {"type": "yarn", **kept}
    monkeypatch.setattr(output_folder, "with_both_ropes", lambda config: {**config, "rope_scaling": None})
    (text,) = [text for text in failed(quantized(tmp_path / "dropped", rope)) if "RoPE" in text]
    assert "the reference has" in text


def test_both_keys_in_a_folder_mean_what_transformers_takes(tmp_path: Path) -> None:
    linear = {"type": "linear", "factor": 4.0}
    both = {"rope_scaling": linear, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    events = quantized(tmp_path, both)
    assert any("rope_scaling was taken" in event.text for event in events if isinstance(event, Warn))
    assert not [text for text in failed(events) if "RoPE" in text]
    written = load_json(tmp_path / "out" / "config.json")
    assert written["rope_scaling"] == linear
    assert written["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "readable"),
    [
        ({"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 4.0}}, True),
        ({}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, True),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, False),
        ({"rope_theta": 1e5, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, False),
        ({"rope_scaling": {"type": "linear", "factor": 4.0, "rope_theta": 1e5}}, False),
    ],
)
def test_exllamav2_is_given_no_rope_that_it_does_not_see(rope: dict[str, Any], readable: bool) -> None:
    checkpoint = open_checkpoint("sample:")
    job = cast(Exl2Job, SimpleNamespace(model=SimpleNamespace(checkpoint=checkpoint, raw=rope, source=None)))
    if readable:
        assert check_readable(job) is None  # type: ignore[func-returns-value]
        return
    with pytest.raises(UsageError, match="rope_theta and rope_scaling only"):
        check_readable(job)


@pytest.mark.parametrize(
    ("layout", "key"), [("transformers", "text_config"), ("original", "language_config")]
)
def test_the_decoder_inside_a_bigger_model_is_read_from_its_own_part(
    layout: tiny_vl.Layout, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_vl.tiny_towers(monkeypatch)
    source = tiny_vl.vl_checkpoint(tmp_path / "model", tiny_vl.VL(), layout)
    raw = load_json(source / "config.json")
    part = {name: value for name, value in raw[key].items() if not name.startswith("rope")}
    part |= {"rope_theta": 50000.0, "rope_scaling": YARN}
    (source / "config.json").write_text(json.dumps({**raw, key: part}), "utf-8")
    ask = ("gguf", source, "-q", "f32", "-o", tmp_path / "out.gguf", "--no-mmproj", "--force")
    for options in ((), ("--verify", "full")):
        made = command(*ask, *options)
        assert made.exit_code == 0, made.output
        with monkeypatch.context() as patch:
            dropping(patch, "mscale")
            made = command(*ask, *options)
        assert made.exit_code == 3, made.output
        assert DROPPED["mscale"][1] in made.stderr
