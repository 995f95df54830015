"""How RoPE's keys are read, twice, against transformers' own class built of the same config.json."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_llama import BASE, make, tokens

from converters.gguf.parse import GGUFFile
from converters.gguf.rope import notes, scaling_keys
from converters.gguf.stored_config import stored_scaling
from dsconvert.checkpoints.output_folder import with_both_ropes
from dsconvert.decoder import numpy_config
from dsconvert.decoder.numpy_config import Numbers, Unread, numbers
from dsconvert.errors import CheckpointError
from dsconvert.models.architectures.llama import DEFAULTS, LLAMA
from dsconvert.models.config import ModelConfig, normalise
from dsconvert.models.rope import KEYS, Rope, rope_factors
from dsconvert.proof import numpy_compare
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from dsconvert.decoder.torch_config import _old_spelling, library_config, numbers_of, open_rotary  # noqa: E402

if transformers.__version__ < "5":
    pytest.skip("needs transformers 5, whose rule is the reference here", allow_module_level=True)
transformers.logging.set_verbosity_error()

RAW = {k: v for k, v in BASE.items() if not k.startswith("rope")}
CPU = torch.device("cpu")
NUMBERS = st.floats(1.0, 64.0)
CONTEXTS = st.sampled_from([32, 64, 128, 200, 256, 4096])
EXTRA = {"finetuned": st.booleans(), "mrope_section": st.just([1, 2]), "short_factor": st.just([1.0])}
YARN = {
    "factor": st.none() | NUMBERS | st.integers(1, 40) | st.just(0.5),
    "original_max_position_embeddings": CONTEXTS,
    "attention_factor": st.none() | st.floats(0.1, 4.0),
    "beta_fast": st.sampled_from([None, 0, 32, 32.0, 31.0, 8.0, 64.0, 2.0]),
    "beta_slow": st.sampled_from([None, 0, 1, 1.0, 1.05, 2.0, 4.0, 40.0]),
    "mscale": st.sampled_from([None, 0, 1, 1.0, 0.707, 2.0]),
    "mscale_all_dim": st.sampled_from([None, 0, 1.0, 0.8]),
    "truncate": st.sampled_from([True, False, None]),
}
LLAMA3 = {
    "factor": NUMBERS,
    "low_freq_factor": st.floats(0.5, 2.0),
    "high_freq_factor": st.floats(2.5, 8.0),
    "original_max_position_embeddings": CONTEXTS,
}
SUBKEYS: dict[str, dict[str, Any]] = {
    "default": {"factor": NUMBERS},
    "linear": {"factor": NUMBERS | st.just(0.5), "attention_factor": st.floats(0.5, 2.0)},
    "dynamic": {"factor": NUMBERS},
    "yarn": YARN,
    "llama3": LLAMA3,
}


@st.composite
def settings_of(draw: st.DrawFn) -> dict[str, Any]:
    """One dictionary of RoPE settings of any type, with any of its keys, some foreign ones, some left out."""
    kind = draw(st.sampled_from([*SUBKEYS, "longrope", "su"]))
    values = {**SUBKEYS.get(kind, YARN), **EXTRA}
    wanted = draw(st.sets(st.sampled_from(sorted(values))))
    if draw(st.integers(0, 9)):  # most have the keys that their type asks for
        wanted |= set(SUBKEYS.get(kind, {})) & {"factor", "low_freq_factor", "high_freq_factor"}
    found = {name: draw(values[name]) for name in sorted(wanted)}
    for spelling in draw(st.sampled_from([("type",), ("rope_type",), ("type", "rope_type")])):
        found[spelling] = kind
    if draw(st.booleans()):
        found["rope_theta"] = draw(st.sampled_from([10000.0, 500000.0, 100, 1e6]))
    return found


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """config.json with RoPE under one key, under the other, under both, or under none."""
    raw: dict[str, Any] = {**RAW, "head_dim": draw(st.sampled_from([None, 8, 16, 64]))}
    for key in KEYS:
        if draw(st.booleans()):
            raw[key] = draw(st.none() | settings_of())
    if all(raw.get(key) for key in KEYS) and draw(st.booleans()):
        raw[KEYS[1]]["rope_theta"] = raw[KEYS[0]].get("rope_theta", 10000.0)
    if draw(st.booleans()):
        raw["rope_theta"] = draw(st.sampled_from([10000.0, 500000.0]))
    if draw(st.integers(0, 5)) == 0:
        raw["original_max_position_embeddings"] = draw(CONTEXTS)
    return raw


def expected(raw: dict[str, Any]) -> Numbers:
    """What transformers makes of it, without a word of ours between."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    llama = transformers.LlamaConfig(**copy.deepcopy(raw))
    return numbers_of(normalise(RAW, "config.json"), llama, LlamaRotaryEmbedding(config=llama))


def same(found: Numbers, wanted: Numbers) -> None:
    np.testing.assert_allclose(found.angles, wanted.angles, rtol=2e-6)
    assert found.scale == pytest.approx(wanted.scale, rel=1e-6)
    assert (found.head_dim, found.heads, found.kv_heads) == (wanted.head_dim, wanted.heads, wanted.kv_heads)
    assert (found.norm_eps, found.context_length) == (wanted.norm_eps, wanted.context_length)
    assert found.rope_theta == wanted.rope_theta


MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@MANY
@given(configs())
def test_the_numpy_proof_reads_what_transformers_does(raw: dict[str, Any]) -> None:
    """Also where the converter refuses: the two readings know nothing of each other."""
    try:
        found = numpy_config.read_raw(raw, DEFAULTS)
    except Unread:
        return
    same(found, expected(raw))


def written(config: ModelConfig) -> ModelConfig:
    """The config as it is read back of a GGUF file with the keys and tensors that are written for it."""
    keys = {f"llama.{key}": np.float32(v).item() if kind == "float32" else v
            for key, (kind, v) in scaling_keys(config, LLAMA).items()}  # fmt: skip
    tensors = {
        name: SimpleNamespace(float32=lambda array=array: array)
        for name, array in rope_factors(config).items()
    }
    file = cast(GGUFFile, SimpleNamespace(keys=keys, tensors=tensors, path="x.gguf"))
    return dataclasses.replace(config, decoder={}, rope_scaling=stored_scaling(file, "llama."))


@MANY
@given(configs())
def test_a_file_says_what_transformers_does_or_the_key_is_named(raw: dict[str, Any]) -> None:
    try:
        config = normalise(raw, "config.json")
        found = numbers(written(config))
    except CheckpointError as error:
        stated = {key for part in (raw, *(raw.get(key) or {} for key in KEYS)) for key in part}
        named = {
            key for key in (*stated, "factor", "low_freq_factor", "high_freq_factor") if key in str(error)
        }
        assert named, str(error)
        return
    same(found, expected(raw))


@MANY
@given(configs())
def test_a_folder_says_the_same_to_every_reader(raw: dict[str, Any]) -> None:
    """Both spellings, and each alone as transformers 4 and readers older than it see it.

    So does the reference that is built of the source where transformers 4 is installed.
    """
    try:
        config = normalise(raw, "config.json")
    except CheckpointError:
        return
    wanted, both = expected(raw), with_both_ropes(raw)
    if both == {**raw}:  # no RoPE key at all
        same(
            numbers_of(config, library_config(config), open_rotary(config, library_config(config), CPU)),
            wanted,
        )
        return
    outside = "original_max_position_embeddings"
    old = {k: v for k, v in both.items() if k not in ("rope_parameters", outside)}
    new = {k: v for k, v in both.items() if k not in ("rope_scaling", "rope_theta", outside)}
    four = _old_spelling(raw)
    assert not {"rope_parameters"} & four.keys()
    assert "rope_theta" not in (four["rope_scaling"] or {})
    for seen in (both, old, new, four):
        same(expected(seen), wanted)
    assert with_both_ropes(both) == both


def test_the_torch_decoder_is_built_of_the_raw_config(monkeypatch: pytest.MonkeyPatch) -> None:
    import dsconvert.models.config

    scaling = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    raw = {**RAW, "rope_scaling": scaling, "rms_norm_eps": 1e-5}
    monkeypatch.setattr(dsconvert.models.config, "read_rope", lambda raw, get: Rope(10000.0, None))
    config = dataclasses.replace(normalise(raw, "config.json"), norm_eps=0.5, heads=2, head_dim=32)
    llama = library_config(config)
    for found in (numbers_of(config, llama, open_rotary(config, llama, CPU)), numbers(config)):
        same(found, expected(raw))
    assert raw["rope_scaling"] == scaling  # nor is config.json changed by who reads it


def test_an_unknown_key_is_left_to_transformers() -> None:
    _, _, config = make()
    unknown = dataclasses.replace(config, decoder={**config.decoder, "attention_bonus": 3})
    text = windows.whole(tokens(config, 1, 32))
    with pytest.raises(Unread, match="attention_bonus"):
        numbers(unknown)
    with pytest.raises(Unread, match="max_position_embeddings"):
        dynamic = {**config.decoder, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
        other = dataclasses.replace(config, decoder={**dynamic, "max_position_embeddings": 16})
        numpy_compare.read_both(other, other, text)
    assert numpy_compare.knows(config, config, text)
    assert not numpy_compare.knows(unknown, config, text)


def test_notes_say_what_was_taken() -> None:
    both = {
        **RAW,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    }
    (note,) = notes(normalise(both, "config.json"))
    assert "rope_scaling (linear) and rope_parameters (default)" in note
    assert notes(normalise({**both, "rope_parameters": dict(both["rope_scaling"])}, "config.json")) == ()
    dynamic = {**RAW, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (note,) = notes(normalise(dynamic, "config.json"))
    assert "as trained, up to 256 tokens" in note
    original = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    two = {**RAW, "rope_scaling": original, "original_max_position_embeddings": 128}
    (note,) = notes(normalise(two, "config.json"))
    assert "128" in note


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("llama.rope.scaling.type", "longrope", "'longrope'"),
        ("llama.rope.scaling.factor", "4", "a positive number"),
        ("llama.rope.scaling.factor", math.nan, "a positive number"),
        ("llama.rope.scaling.attn_factor", -1.0, "a positive number"),
    ],
)
def test_a_strangers_keys_are_checked(key: str, value: Any, told: str) -> None:
    file = cast(GGUFFile, SimpleNamespace(keys={key: value}, tensors={}, path=Path("x.gguf")))
    with pytest.raises(CheckpointError, match=told) as caught:
        stored_scaling(file, "llama.")
    assert key in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "angle", "scale"),
    [
        ({}, 1.0, 1.0),
        ({"scaling.factor": 4.0}, 0.25, 1.0),  # a type that is not stated is linear
        ({"scale_linear": 4.0}, 0.25, 1.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0, 1.0),
        ({"scaling.type": "linear", "scaling.factor": 4.0, "scaling.attn_factor": 0.5}, 0.25, 0.5),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_beta_fast": 8.0}, None, 1.1386294),
        ({"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.attn_factor": 0.5}, None, 0.5693147),
    ],
)
def test_a_strangers_keys_are_read_as_llama_cpp_does(keys: Any, angle: float | None, scale: float) -> None:
    config = normalise(RAW, "config.json")
    stated = {f"llama.rope.{key}": value for key, value in keys.items()}
    file = cast(GGUFFile, SimpleNamespace(keys=stated, tensors={}, path="x.gguf"))
    config = dataclasses.replace(config, decoder={}, rope_scaling=stored_scaling(file, "llama."))
    found = numbers(config)
    assert found.scale == pytest.approx(scale)
    if angle is not None:
        np.testing.assert_allclose(found.angles / numpy_config.unscaled(10000.0, 16), angle, rtol=1e-6)
    else:  # beta_fast is not read
        usual = {"rope_type": "yarn", "factor": 4.0}
        wanted = expected({**RAW, "rope_scaling": usual})
        np.testing.assert_allclose(found.angles, wanted.angles, rtol=1e-6)


def test_transformers_reads_no_other_key() -> None:
    """Every attribute of the config that a Llama's code asks for is one that is carried, refused or moot."""
    asked: set[str] = set()

    class Watched(transformers.LlamaConfig):  # type: ignore[name-defined,misc]
        def __getattribute__(self, name: str) -> Any:
            asked.add(name)
            return super().__getattribute__(name)

    config = Watched(**{k: v for k, v in RAW.items() if k != "architectures"})
    asked.clear()
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False)
    sounding = {name for name in asked if numpy_config.SOUNDS.search(name) and not name.startswith("_")}
    methods = {name for name in sounding if callable(getattr(transformers.LlamaConfig, name, None))}
    moot = {"attn_implementation", "output_attentions"}
    assert sounding - methods - moot <= {*numpy_config.KNOWN}, (
        sounding - methods - moot - {*numpy_config.KNOWN}
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64},
        {"attention_chunk_size": 64},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"is_causal": False},
        {"per_layer_config": {"0": {"head_dim": 8}}},
        {"partial_rotary_factor": 0.5},
        {"rope_theta": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_llama_honours_and_no_file_carries_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        normalise({**RAW, **changes}, "config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None},
        {"sliding_window": 256},
        {"layer_types": ["full_attention"] * 3},
        {"is_causal": True},
        {"partial_rotary_factor": 1.0},
        {"attention_multiplier": 0.5, "use_flash_attn": True, "rope_interleave": True},  # no Llama reads them
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_changes_nothing_passes(changes: dict[str, Any]) -> None:
    assert normalise({**RAW, **changes}, "config.json") == normalise(RAW, "config.json")


YARN_FORMS: list[dict[str, Any]] = [
    {}, {"attention_factor": 0.9}, {"attention_factor": None}, {"beta_fast": 8.0}, {"beta_slow": 4},
    {"beta_fast": 8, "beta_slow": 16}, {"beta_fast": 0, "beta_slow": None}, {"mscale": 0.707},
    {"mscale": 0.707, "mscale_all_dim": 1.0}, {"mscale": 2.0, "mscale_all_dim": 1.0, "attention_factor": 1.5},
    {"truncate": False}, {"truncate": None}, {"truncate": False, "beta_fast": 8.0}, {"finetuned": True},
    {"factor": None}, {"factor": 1.0}, {"factor": 0.5}, {"original_max_position_embeddings": 8},
]  # fmt: skip


@pytest.mark.parametrize("form", YARN_FORMS, ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_every_sub_key_of_yarn_is_read(form: dict[str, Any], head_dim: int) -> None:
    """None of these is left to chance, or to transformers: numpy's reading gives an answer to each."""
    settings = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, **form}
    raw = {**RAW, "head_dim": head_dim, "rope_scaling": settings, "rope_theta": 50000.0}
    wanted = expected(raw)
    same(numpy_config.read_raw(raw, DEFAULTS), wanted)
    config = normalise(raw, "config.json")
    llama = library_config(config)
    same(numbers_of(config, llama, open_rotary(config, llama, CPU)), wanted)


def test_a_mistral_is_read_as_its_own_class_does() -> None:
    """Its absent keys have other defaults, and its RoPE is Llama's."""
    from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding

    raw = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 128,
        "num_attention_heads": 8, "sliding_window": None,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    }  # fmt: skip
    config = normalise(raw, "config.json")
    theirs = transformers.MistralConfig(**copy.deepcopy(raw))
    wanted = numbers_of(config, theirs, MistralRotaryEmbedding(config=theirs))
    same(numbers(config), wanted)
    llama = library_config(config)
    same(numbers_of(config, llama, open_rotary(config, llama, CPU)), wanted)
    assert config.intermediate_size == theirs.intermediate_size == llama.intermediate_size
    with pytest.raises(CheckpointError, match="sliding_window"):  # 4096 where it is absent
        normalise({k: v for k, v in raw.items() if k != "sliding_window"}, "config.json")
