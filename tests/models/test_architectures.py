"""Each architecture by tiny models of transformers' own class: GGUF, GPTQ, EXL2, and what configs mean."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_families
from agreement import LIMIT, file_of, measured, token_ids
from click.testing import CliRunner
from random_llama import Memory
from tiny_families import FAMILIES

from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.decoder import numpy_config, numpy_decoder
from dsconvert.errors import CheckpointError, PlanError
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import normalise
from dsconvert.models.tensor_table import plan

CALIB = ("--calib", "builtin", "--calib-samples", "8", "--calib-len", "128")
# The keys that llama.cpp's converter writes of a model, without the prefix, beside the usual ones.
USUAL = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base",
}  # fmt: skip
HEAD = {"attention.key_length", "attention.value_length"}
# By family: the architecture in the file, its further keys, whether q and k have adjacent pairs.
FILES: dict[str, tuple[str, set[str], bool]] = {
    "llama": ("llama", {"rope.dimension_count", "vocab_size", *HEAD}, True),
    "qwen2": ("qwen2", set(), False),
    "qwen3": ("qwen3", HEAD, False),
    "mistral": ("llama", {"rope.dimension_count", "vocab_size", *HEAD}, True),
}


def command(*words: object) -> str:
    done = CliRunner().invoke(cli, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny_families.checkpoint(folder / name, name) for name in FAMILIES}


@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_computes_what_transformers_does(name: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_families.checkpoint(tmp_path / "model", name, tie_word_embeddings=tied)
    assert measured(model, tmp_path / "x.gguf") < LIMIT


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_and_key_is_as_llama_cpp_has_it(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    kind, keys, pairs = FILES[name]
    model = tiny_families.random_model(name)
    arrays = {key: p.detach().numpy() for key, p in model.named_parameters()}
    expected = tiny_families.stored(arrays, model.model.layers[0].self_attn.head_dim if pairs else 0)
    file = open_gguf(file_of(models[name], tmp_path / "x.gguf"))
    assert set(file.tensors) == set(expected)
    for tensor, array in expected.items():
        assert file.tensors[tensor].float32().tobytes() == np.ascontiguousarray(array).tobytes(), tensor
    assert file.keys["general.architecture"] == kind
    own = {key.removeprefix(f"{kind}.") for key in file.keys if key.startswith(f"{kind}.")}
    assert own == USUAL | keys
    head_dim = model.model.layers[0].self_attn.head_dim
    assert all(file.keys[f"{kind}.{key}"] == head_dim for key in keys & HEAD)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_defaults_are_those_of_the_config_class(name: str) -> None:
    """Each key of ours, and no size or flag that the class has one for and we do not."""
    pytest.importorskip("transformers")
    architecture = ARCHITECTURES[name].decoder
    library, ours = architecture.torch_classes().config, architecture.defaults
    if not isinstance(library, type):
        pytest.skip(f"transformers has no class of {name}: its config is put together")
    stated = {key: value for key, value in ours.items() if key != "rope_theta"}
    assert {key: getattr(library, key) for key in stated} == stated
    assert library().rope_parameters["rope_theta"] == ours["rope_theta"]
    for key in ("num_key_value_heads", "head_dim", "attention_bias", "mlp_bias", "use_sliding_window"):
        if key == "head_dim" and architecture.latent is not None:
            continue  # what RoPE turns of a head, which qk_rope_head_dim says
        assert key in ours or getattr(library, key, None) is None, key


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m", "q2_k", "iq4_xs"])
@pytest.mark.parametrize("name", FAMILIES)
def test_files_are_proven(name: str, quant: str, models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "x.gguf"
    weighted = CALIB if quant == "iq4_xs" else ()
    command("gguf", models[name], "-q", quant, "-o", out, "--verify", "off", "--quiet", *weighted)
    command("compare", out, "--against", models[name])
    assert FILES[name][0] in command("inspect", out)


@pytest.mark.parametrize(
    "words", [("gptq", "--bits", "8", "--group-size", "32"), ("exl2", "--bpw", "8", "--head-bits", "16")]
)
@pytest.mark.parametrize("name", FAMILIES)
def test_folders_are_proven_and_name_their_class(
    name: str, words: tuple[str, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    import transformers

    from dsconvert.models.config import load_json

    out = tmp_path / "out"
    command(*words, models[name], "--out", out, *CALIB, "--verify", "off", "--quiet")
    command("verify", out, "--against", models[name], "--quiet")
    raw = load_json(out / "config.json")
    assert raw["architectures"] == [FAMILIES[name][0]]
    del raw["quantization_config"]
    config = transformers.AutoConfig.for_model(**raw)
    with torch.device("meta"):
        theirs = getattr(transformers, FAMILIES[name][0])(config).state_dict()
    if words[0] == "gptq":
        from converters.gptq.reader import open_model
    else:
        from converters.exl2.reader import open_model  # type: ignore[assignment]
    ours: Any = open_model(out)
    assert {key: tuple(value.shape) for key, value in theirs.items()} == dict(ours.shapes())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_numpy_decoder_computes_what_transformers_does(name: str) -> None:
    import torch

    model = tiny_families.random_model(name)
    source = Memory({key: p.detach().numpy() for key, p in model.named_parameters()})
    numbers, ids = numpy_config.numbers(config(name)), token_ids()[None, :40]
    blocks, head = numpy_decoder.tensor_names(source, config(name))
    hidden = source.float32(numpy_decoder.EMBED)[ids]
    for block in blocks:
        hidden = numpy_decoder.block(numbers, {a: source.float32(n) for a, n in block.items()}, hidden)
    last = source.float32(numpy_decoder.NORM), source.float32(head)
    found = numpy_decoder.logits(hidden[0], *last, numbers.norm_eps)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits[0].numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_an_importance_matrix_is_made(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    command("imatrix", models[name], *CALIB, "--outfile", tmp_path / "i.gguf", "--quiet")
    names = set(open_gguf(tmp_path / "i.gguf").tensors)
    assert {f"blk.{i}.attn_q.weight.in_sum2" for i in range(3)} <= names


@pytest.mark.parametrize("name", FAMILIES)
def test_the_class_is_recognised(name: str) -> None:
    """By the model type alone, by its inner class and by wrappers' words."""
    from dsconvert.models.model_class import model_class

    kind = FAMILIES[name][0]
    inner = kind.replace("ForCausalLM", "Model")
    for raw in (
        {"model_type": name},
        {"architectures": [inner], "model_type": name},
        {"architectures": [inner]},
        {"architectures": [f"FSDP{kind}"], "model_type": name},
        {"architectures": [kind, "PeftModel"], "model_type": name},
    ):
        assert model_class(raw).name == kind, raw


def config(name: str, **changes: Any) -> Any:
    kind, keys = FAMILIES[name]
    raw = {"architectures": [kind], "model_type": name, **tiny_families.SIZES, **keys, **changes}
    return normalise(raw, "config.json")


WINDOW = {"use_sliding_window": True, "sliding_window": 128}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({**WINDOW, "max_window_layers": 2}, "sliding_window is 128"),
        ({**WINDOW, "max_window_layers": 0}, "sliding_window is 128"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types names other layers"),
        ({"use_sliding_window": 1}, "use_sliding_window is"),
    ],
)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("qwen")])
def test_a_window_that_counts_is_refused(name: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(CheckpointError, match=told):
        config(name, **changes)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("qwen")])
def test_a_window_that_counts_in_no_layer_is_none(name: str) -> None:
    plain = config(name)
    assert config(name, sliding_window=128) == plain
    assert config(name, use_sliding_window=False, sliding_window=None, max_window_layers=0) == plain
    assert config(name, **WINDOW, max_window_layers=3) == plain  # as many as there are
    assert config(name, use_sliding_window=True, sliding_window=1024, max_window_layers=0) == plain


def test_a_bias_of_qwen2_that_is_missing_in_one_layer_is_named() -> None:
    shapes = {name: tuple(p.shape) for name, p in tiny_families.random_model("qwen2").named_parameters()}
    table = ARCHITECTURES["Qwen2ForCausalLM"].table
    assert plan(table, config("qwen2"), shapes)
    del shapes["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(PlanError, match=r"1 missing: 'model.layers.1.self_attn.k_proj.bias'"):
        plan(table, config("qwen2"), shapes)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
        ("Qwen2MoeForCausalLM", "qwen2_moe"),
    ],
)
def test_a_relative_is_refused_by_its_own_name(name: str, model_type: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' has no table"):
        normalise({"architectures": [name], "model_type": model_type, **tiny_families.SIZES}, "config.json")


@pytest.mark.parametrize(
    ("name", "raised"), [("llama", (False, True)), ("qwen2", (True, True)), ("qwen3", (False, False))]
)
def test_attn_v_is_raised_in_the_shape_that_llama_quantize_knows(
    name: str, raised: tuple[bool, bool]
) -> None:
    """For as many heads of keys as of queries, and for fewer."""
    wide = ARCHITECTURES[FAMILIES[name][0]].wide_values
    assert raised == tuple(wide(config(name, num_hidden_layers=80, num_key_value_heads=n)) for n in (4, 2))
    assert not wide(config(name, num_hidden_layers=79))


def test_biases_that_no_file_of_qwen3_holds_are_refused() -> None:
    with pytest.raises(CheckpointError, match="attention_bias is true"):
        config("qwen3", attention_bias=True)


def test_r1_0528_qwen3_is_read_as_published(tmp_path: Path) -> None:
    """Its yarn's attn_factor is gone by neither in transformers nor in llama.cpp, and is told."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e6}
    yarn |= {"attn_factor": 0.8782488562869419}
    found = config("qwen3", rope_theta=1e6, rope_scaling=yarn)
    assert any("attn_factor 0.878249" in note for note in found.notes)
    assert config("qwen3", head_dim=None).head_dim == 64
    raw = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert normalise(raw, "config.json").head_dim == 128
    if importlib.util.find_spec("xllamacpp") is not None:
        model = tiny_families.checkpoint(tmp_path / "model", "qwen3", {"rope_parameters": yarn})
        assert measured(model, tmp_path / "x.gguf") < LIMIT


def test_factors_of_frequencies_have_no_place_in_a_file_of_qwen2(tmp_path: Path) -> None:
    """llama.cpp reads rope_freqs.weight of a Llama only; a folder keeps the scaling."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling = {**scaling, "original_max_position_embeddings": 256, "rope_theta": 1e6}
    model = tiny_families.checkpoint(tmp_path / "model", "qwen2", {"rope_parameters": scaling})
    with pytest.raises(CheckpointError, match="'llama3' cannot be written"):
        file_of(model, tmp_path / "x.gguf")
    command(
        "gptq", model, "--out", tmp_path / "o", *CALIB, "--group-size", "32", "--verify", "off", "--quiet"
    )
