"""The normalised config against transformers' own LlamaConfig: defaults, RoPE keys old and new, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner

from dsconvert.cli import cli
from dsconvert.errors import CheckpointError
from dsconvert.models import config as config_file
from dsconvert.models.architectures.llama import DEFAULTS
from dsconvert.models.config import ModelConfig, load_config, load_json, normalise
from dsconvert.models.rope import RopeScaling
from dsconvert.quantization.linears import select

PEER = Path(__file__).parents[3] / "shared" / "data" / "peers" / "tiny256"
BASE: dict[str, Any] = {"architectures": ["LlamaForCausalLM"]}
LINEAR = RopeScaling("linear", 4.0)


def read(**changes: Any) -> ModelConfig:
    return normalise({**BASE, **changes}, "config.json")


def test_absent_keys_mean_what_transformers_takes() -> None:
    from transformers import LlamaConfig

    library = LlamaConfig().to_dict()
    theta = library.pop("rope_parameters")["rope_theta"]
    assert {key: {**library, "rope_theta": theta}[key] for key in DEFAULTS} == DEFAULTS
    config = read()
    assert (config.hidden_size, config.layers, config.kv_heads, config.head_dim) == (4096, 32, 32, 128)
    assert config.rope_scaling is None
    assert not config.explicit_head_dim


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_key_value_heads": 4},
        {"head_dim": 80},
        {"rope_theta": 1e6},
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 100000.0},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}},
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 5.0,
                "original_max_position_embeddings": 1024,
            }
        },
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ],
)
def test_a_config_that_transformers_saves_reads_as_the_old_one(tmp_path: Path, options: Any) -> None:
    """The same options in the old keys, and as today's transformers writes them, are one config."""
    from transformers import LlamaConfig

    old = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 2048, **options}
    LlamaConfig(**json.loads(json.dumps(old)), architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    saved = load_json(tmp_path / "config.json")
    assert "rope_parameters" in saved
    assert "rope_theta" not in saved
    new, expected = load_config(tmp_path), read(**old)
    assert (new.rope_theta, new.rope_scaling) == (expected.rope_theta, expected.rope_scaling)
    assert new.dims == expected.dims
    assert (new.tied, new.attention_bias, new.mlp_bias) == (
        expected.tied,
        expected.attention_bias,
        expected.mlp_bias,
    )


def test_rope_of_deepseek_coder() -> None:
    config = read(rope_theta=100000, rope_scaling={"type": "linear", "factor": 4.0})
    assert (config.rope_theta, config.rope_scaling) == (100000.0, LINEAR)


@pytest.mark.parametrize("rope", ["old", "new", "linear"])
def test_the_tiny_checkpoints_configs(tmp_path: Path, rope: tiny.Rope) -> None:
    config = load_config(tiny.tiny_checkpoint(tmp_path, rope=rope, layers=1, tokenizer=False))
    assert config.rope_scaling == (LINEAR if rope == "linear" else None)
    assert config.rope_theta == (100000.0 if rope == "linear" else 10000.0)
    assert config.dims == {
        "d": 64,
        "ff": 160,
        "q": 64,
        "kv": 32,
        "heads": 4,
        "kv_heads": 2,
        "v": 512,
        "hd": 16,
        "layers": 1,
    }


@pytest.mark.skipif(not PEER.exists(), reason=f"needs the trained model in {PEER}")
def test_a_config_of_today() -> None:
    config = load_config(PEER)
    assert config.explicit_head_dim
    assert config.dims == {
        "d": 256,
        "ff": 768,
        "q": 256,
        "kv": 256,
        "heads": 4,
        "kv_heads": 4,
        "v": 1024,
        "hd": 64,
        "layers": 4,
    }


@pytest.mark.parametrize(
    "null", ["rope_scaling", "rope_parameters", "head_dim", "num_key_value_heads", "mlp_bias"]
)
def test_null_means_absent(null: str) -> None:
    assert read(**{null: None}) == read()


def test_the_model_type_names_the_class_of_old_files() -> None:
    assert normalise({"model_type": "llama"}, "here").architecture == "LlamaForCausalLM"
    with pytest.raises(CheckpointError, match="'GemmaForCausalLM' has no table"):
        read(architectures=["GemmaForCausalLM"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": ["A", "B"]}, "does not name one architecture"),
        ({"architectures": None, "model_type": "gpt2"}, "does not name one architecture"),
        ({"hidden_size": "4096"}, "hidden_size is '4096', should be a positive whole number"),
        ({"hidden_size": True}, "hidden_size is 'True'"),
        ({"num_hidden_layers": 2_000_000_000}, "below 4096"),
        ({"num_key_value_heads": 5}, "5 does not divide num_attention_heads 32"),
        ({"num_attention_heads": 33}, "33 does not divide hidden_size 4096"),
        ({"head_dim": 65}, "65 is odd"),
        ({"hidden_act": "gelu" * 100}, "is not silu"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is 'nan'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "known: default, linear, dynamic, yarn, llama3"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": "linear"}, "neither an object nor null"),
        ({"tie_word_embeddings": "no"}, "should be true or false"),
    ],
)
def test_errors_name_the_key_the_value_and_the_file(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        normalise({**BASE, **changes}, "folder/config.json")
    text = str(caught.value)
    assert text.startswith("folder/config.json: ")
    assert told in text
    assert "\n" not in text
    assert len(text) < 400


def test_partial_rotation_is_refused() -> None:
    raw = {"architectures": ["LlamaForCausalLM"], "rope_parameters": {"partial_rotary_factor": 0.5}}
    with pytest.raises(CheckpointError, match="partial_rotary_factor"):
        normalise(raw, "config.json")


def test_config_json_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint's opening reads it and hands it on; where the tokenizer looks for EOS is not counted."""
    folder = tiny.tiny_checkpoint(tmp_path / "model", layers=1)
    parsed: list[str] = []
    plain = config_file.read_object

    def counted(path: Path, *rest: Any) -> Any:
        parsed.append(path.name)
        return plain(path, *rest)

    monkeypatch.setattr(config_file, "read_object", counted)
    made = CliRunner().invoke(cli, ["gguf", str(folder), "--dry-run", "-o", str(tmp_path / "out.gguf")])
    assert made.exit_code == 0, made.output
    assert parsed == ["config.json"]
    parsed.clear()
    assert select(str(folder), language_only=False).config.layers == 1
    assert parsed == ["config.json"]
