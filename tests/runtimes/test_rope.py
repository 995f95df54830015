"""Every published form of RoPE: transformers on the folder as it is against llama.cpp on our file of it."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from converters.gguf.convert import convert
from converters.gguf.output import Options
from dsconvert.errors import CheckpointError

SAMPLE = Path(__file__).parents[2] / "dsconvert" / "sample"
TOKENS = 320
LIMIT = 1e-9
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
DEFAULT = {"rope_theta": 10000.0, "rope_type": "default"}
USUAL = 1 + 0.1 * math.log(4.0)

CARRIED: dict[str, dict[str, Any]] = {
    "no key at all": {},
    "default, new spelling": {"rope_parameters": DEFAULT},
    "default with theta": {"rope_parameters": {**DEFAULT, "rope_theta": 50000.0}},
    "linear, old spelling": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e5},
    "linear, new spelling": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e5}},
    "linear with an attention_factor, unread": {
        "rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 0.5}
    },
    "yarn": {"rope_scaling": YARN},
    "yarn, new spelling": {"rope_parameters": {**YARN, "rope_theta": 50000.0}},
    "yarn, old spelling, finetuned": {
        "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "finetuned": True,
        }
    },
    "yarn without original_max_position_embeddings": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, original_max_position_embeddings outside": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "original_max_position_embeddings": 256,
    },
    "yarn, attn_factor, unread": {"rope_scaling": {**YARN, "attn_factor": 0.8782488562869419}},
    "yarn, factor null": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, factor 1": {"rope_scaling": {**YARN, "factor": 1.0}},
    "yarn, attention_factor 1": {"rope_scaling": {**YARN, "attention_factor": 1.0}},
    "yarn, attention_factor as usual": {"rope_scaling": {**YARN, "attention_factor": USUAL}},
    "yarn, attention_factor null": {"rope_scaling": {**YARN, "attention_factor": None}},
    "yarn, mscale and mscale_all_dim 1": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, mscale 1, mscale_all_dim 0.8": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.8}},
    "yarn, mscale alone, unread": {"rope_scaling": {**YARN, "mscale": 2.0}},
    "yarn, mscale beside attention_factor": {
        "rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 1.0, "attention_factor": 1.25}
    },
    "yarn, beta_fast 32, beta_slow 1": {"rope_scaling": {**YARN, "beta_fast": 32, "beta_slow": 1}},
    "yarn, beta_fast 31, the same corner": {"rope_scaling": {**YARN, "beta_fast": 31.0}},
    "yarn, truncate true": {"rope_scaling": {**YARN, "truncate": True}},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "llama3, new spelling": {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
    "llama3 without original_max_position_embeddings": {
        "rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}
    },
    "dynamic within its range": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "both keys, linear beside default": {
        "rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": DEFAULT,
    },
    "both keys, yarn beside default": {"rope_scaling": YARN, "rope_parameters": DEFAULT},
    "both keys, default beside linear": {
        "rope_scaling": {"rope_type": "default"},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    },
    "both keys, rope_scaling null": {
        "rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
    },
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "yarn, beta_fast 8": ({"rope_scaling": {**YARN, "beta_fast": 8.0}}, "beta_fast"),
    "yarn, beta_slow 4": ({"rope_scaling": {**YARN, "beta_slow": 4.0}}, "beta_slow"),
    "yarn, both betas": (
        {"rope_scaling": {**YARN, "beta_fast": 8.0, "beta_slow": 4.0}},
        "beta_fast and beta_slow",
    ),
    "yarn, truncate false": ({"rope_scaling": {**YARN, "truncate": False}}, "truncate"),
    "yarn, factor below 1": ({"rope_scaling": {**YARN, "factor": 0.5}}, "factor"),
    "longrope": (
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
        "rope_scaling",
    ),
    "su": ({"rope_scaling": {"type": "su", "factor": 2.0}}, "rope_scaling"),
    "proportional": ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "rope_parameters"),
    "both keys, two thetas": (
        {
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "rope_parameters": {**DEFAULT, "rope_theta": 5e5},
        },
        "rope_parameters has rope_theta 500000.0, which transformers does not read beside rope_scaling",
    ),
    "two types": (
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
        "says rope_type 'yarn' and type 'linear'",
    ),
    "a layer type's own": (
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}},
        "full_attention",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "llama3 without its bounds": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor",
    ),
    "a sliding window": ({"sliding_window": 128}, "sliding_window"),
}


def folder(out: Path, changes: dict[str, Any]) -> Path:
    """The sample with these RoPE keys and no others."""
    out.mkdir()
    for file in SAMPLE.iterdir():
        if file.is_file() and file.name != "config.json":
            shutil.copyfile(file, out / file.name)
    raw = json.loads((SAMPLE / "config.json").read_text("utf-8"))
    kept = {key: value for key, value in raw.items() if not key.startswith("rope")}
    (out / "config.json").write_text(json.dumps(kept | changes), "utf-8")
    return out


def converted(model: Path, out: Path) -> list[Any]:
    return list(convert(Options(str(model), ("f32",), out, effort="off")))


def token_ids() -> npt.NDArray[np.int64]:
    ids = np.random.default_rng(7).integers(20, 1900, TOKENS)
    ids[0] = 2000
    return ids


def of_transformers(model: Path) -> npt.NDArray[np.float64]:
    import torch
    import transformers

    llama = transformers.LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        found = llama.eval()(torch.from_numpy(token_ids())[None]).logits[0]
    return np.asarray(found.numpy(), np.float64)


def divergence(base: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Mean KL over all positions of two arrays of logits [tokens, vocab]."""
    logs = [x - x.max(-1, keepdims=True) for x in (base, other)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def measured(work: Path, changes: dict[str, Any]) -> float:
    """The divergence of llama.cpp on our file from transformers on the folder."""
    from dsconvert.runtimes.llamacpp import Engine

    model, out = folder(work / "model", changes), work / "model.gguf"
    converted(model, out)
    with Engine(out, n_ctx=TOKENS, threads=1) as engine:
        found = np.asarray(engine.logits(token_ids()), np.float64)
    return divergence(of_transformers(model), found)


needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)


@needs_llamacpp
@pytest.mark.parametrize("form", CARRIED)
def test_llama_cpp_computes_what_transformers_does(form: str, tmp_path: Path) -> None:
    assert measured(tmp_path, CARRIED[form]) < LIMIT


@needs_llamacpp
def test_the_measure_shows_a_dropped_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from converters.gguf import metadata

    whole = metadata.scaling_keys
    dropped = "rope.scaling.attn_factor"
    monkeypatch.setattr(
        metadata, "scaling_keys", lambda *given: {k: v for k, v in whole(*given).items() if k != dropped}
    )
    assert measured(tmp_path, CARRIED["yarn, mscale and mscale_all_dim 1"]) > 0.01


@pytest.mark.parametrize("form", REFUSED)
def test_what_a_file_cannot_say_is_refused_by_name(form: str, tmp_path: Path) -> None:
    changes, key = REFUSED[form]
    with pytest.raises(CheckpointError) as caught:
        converted(folder(tmp_path / "model", changes), tmp_path / "model.gguf")
    assert key in str(caught.value)
    assert "config.json" in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "model.gguf").exists()


def test_a_factor_that_is_not_gone_by_is_written_and_told(tmp_path: Path) -> None:
    from converters.gguf.parse import open_gguf
    from dsconvert.events import Warn

    model = folder(tmp_path / "model", CARRIED["yarn, attn_factor, unread"])
    told = [e.text for e in converted(model, tmp_path / "x.gguf") if isinstance(e, Warn)]
    assert any("attn_factor 0.878249 of yarn" in text and "by 1.139, " in text for text in told), told
    keys = open_gguf(tmp_path / "x.gguf").keys
    assert keys["llama.rope.scaling.yarn_attn_factor"] == pytest.approx(0.8782488562869419)
    assert "llama.rope.scaling.attn_factor" not in keys
