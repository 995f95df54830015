"""Checkpoints as people have them: whatever wrapper saved them, they give the bytes of the plain one."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.exl2 import backend
from converters.exl2 import plan as exl2
from converters.gguf.convert import convert
from converters.gguf.output import Options
from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.cli import cli
from dsconvert.errors import ConversionError, UsageError
from dsconvert.events import Warn
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.config import load_config
from dsconvert.models.model_class import BY_TYPE, model_class

Tensors = dict[str, Any]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FORMS = ("safetensors", "shards", "bin")
VOCAB = 512


@dataclass
class Model:
    """A checkpoint to be written: its tensors as stored, its config.json, further files by name."""

    tensors: Tensors
    config: dict[str, Any]
    files: dict[str, Any] = field(default_factory=dict)
    index_also: tuple[str, ...] = ()  # names that the index has and no shard

    def rename(self, name: Callable[[str], str]) -> None:
        self.tensors = {name(old): value for old, value in self.tensors.items()}

    def prefix(self, text: str) -> None:
        self.rename(lambda name: text + name)


Change = Callable[[Model], object]


def plain(**options: Any) -> Model:
    asked = tiny.Tiny(**{"vocab": VOCAB, **options})
    stored = {name: tiny.encode(value, asked.dtype) for name, value in tiny.tiny_tensors(asked).items()}
    return Model(stored, tiny.tiny_config(asked))


def write(folder: Path, model: Model, form: str = "safetensors") -> Path:
    """The checkpoint in a folder called "model", so that outputs have the same name in them."""
    folder = folder / "model"
    folder.mkdir(parents=True)
    asked = tiny.Tiny(shards=3 if form == "shards" else 1, format="bin" if form == "bin" else "safetensors")
    tiny.write_json(folder / "config.json", model.config)
    tiny.write_weights(folder, model.tensors, asked)
    tiny.write_tokenizer(folder, VOCAB)
    for name in model.index_also:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        index["weight_map"][name] = "model-00002-of-00003.safetensors"
        tiny.write_json(path, index)
    for name, value in model.files.items():
        tiny.write_json(folder / name, value)
    return folder


def converted(model: Path, out: Path) -> tuple[bytes, str]:
    """The bytes of the GGUF file, and all warnings on the way."""
    path = out / "out.gguf"
    events = list(convert(Options(str(model), outfile=path, quants=("q8_0",), effort="off", force=True)))
    return path.read_bytes(), "\n".join(event.text for event in events if isinstance(event, Warn))


def refusal(model: Path, out: Path) -> str:
    with pytest.raises(ConversionError) as caught:
        converted(model, out)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The file of the plain checkpoint, of a tied one, and of one with biases on all linears but o."""
    found = {}
    for name, model in {"plain": plain(), "tied": plain(tied=True), "biased": biased()}.items():
        folder = tmp_path_factory.mktemp(name)
        found[name], notes = converted(write(folder, model), folder)
        assert not notes or name == "biased"
    return found


def biased() -> Model:
    """Biases on q, k and v, as a Qwen2 model in Llama's names has them."""
    model = plain()
    for layer in range(2):
        for letter, rows in (("q", 64), ("k", 32), ("v", 32)):
            name = f"model.layers.{layer}.self_attn.{letter}_proj.bias"
            model.tensors[name] = tiny.encode(np.linspace(-0.1, 0.1, rows, dtype=np.float32), "bf16")
    model.config["attention_bias"] = True
    return model


# --- names as wrappers and inner classes save them -------------------------------------------------------


def inside(part: str) -> Change:
    """A wrapper around every submodule of the layers, as FSDP and activation checkpointing leave it."""
    return lambda m: m.rename(lambda n: re.sub(r"^(model\.layers\.\d+\.)", rf"\g<1>{part}.", n))


def inner_class(m: Model) -> None:
    m.rename(lambda name: name.removeprefix("model."))


def both(*changes: Change) -> Change:
    def change(model: Model) -> None:
        for one in changes:
            one(model)

    return change


SPELLINGS: dict[str, Change] = {
    prefix: lambda m, prefix=prefix: m.prefix(prefix)
    for prefix in (
        "base_model.model.",
        "_orig_mod.",
        "module.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_orig_mod.base_model.model.",
        "base_model.model._orig_mod.",
        "model.",
        "model.model.",
        "pretrained_model.",
        "_forward_module.",
        "_fsdp_wrapped_module.",
        "language_model.",
        "state_dict.",
        "any.thing.",
    )
}
SPELLINGS |= {
    "the inner class compiled": lambda m: m.rename(lambda n: re.sub(r"^model\.", "model._orig_mod.", n)),
    "every layer wrapped": inside("_fsdp_wrapped_module"),
    "every layer wrapped twice": both(inside("_checkpoint_wrapped_module"), inside("_fsdp_wrapped_module")),
    "the inner class with a head": inner_class,
    "the inner class in a wrapper": both(inner_class, lambda m: m.prefix("module.")),
    "a wrapped inner class and a bare head": both(
        inner_class, lambda m: m.rename(lambda n: n if n == HEAD else "backbone." + n)
    ),
}


@pytest.mark.parametrize(("spelling", "form"), list(zip(SPELLINGS, itertools.cycle(FORMS), strict=False)))
def test_every_spelling_gives_the_plain_bytes(
    tmp_path: Path, expected: dict[str, bytes], spelling: str, form: str
) -> None:
    model = plain()
    SPELLINGS[spelling](model)
    found, notes = converted(write(tmp_path, model, form), tmp_path)
    assert found == expected["plain"]
    assert "names are those of a wrapper or an inner class" in notes
    assert notes.count("\n") == 0


@pytest.mark.parametrize("key", ["state_dict", "model", "module", "model_state_dict", "weights"])
def test_a_trainers_checkpoint_gives_the_plain_bytes(
    tmp_path: Path, expected: dict[str, bytes], key: str
) -> None:
    import torch

    folder = write(tmp_path, plain(), "bin")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}
    whole = {"epoch": 3, "optimizer": optimizer, key: state, "scaler": {}}
    torch.save(whole, folder / "pytorch_model.bin")
    found, notes = converted(folder, tmp_path)
    assert found == expected["plain"]
    assert f"'{key}.model." in notes


def test_of_two_models_in_one_file_the_trainers_own_is_read(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    import torch

    folder = write(tmp_path, plain(), "bin")
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    ema = {name: value * 0 for name, value in state.items()}
    torch.save({"ema": ema, "state_dict": state}, folder / "pytorch_model.bin")
    assert converted(folder, tmp_path)[0] == expected["plain"]


def test_a_name_that_is_no_wrappers_is_not_stripped(tmp_path: Path) -> None:
    model = plain()
    model.tensors["draft.model.norm.weight"] = model.tensors["model.norm.weight"]
    assert "unknown: 'draft.model.norm.weight'" in refusal(write(tmp_path, model), tmp_path)


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    model = plain()
    model.tensors["module.lm_head.weight"] = model.tensors[HEAD]
    text = refusal(write(tmp_path, model), tmp_path)
    assert "one tensor under two names" in text
    assert "'module.lm_head.weight'" in text


# --- tensors that nobody reads, and the tied pair --------------------------------------------------------

LEFTOVERS = {
    "model.rotary_emb.inv_freq": (8,),
    "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
    "model.layers.1.self_attn.rotary_emb.cos_cached": (1, 1, 16, 16),
    "model.layers.1.self_attn.masked_bias": (1,),
    "model.layers.0.self_attn.k_proj.k_scale": (1,),
    "model.layers.0.self_attn.v_scale": (1,),
    "model.layers.0.self_attn.attn.k_scale": (1,),
    "v_head.summary.weight": (1, 64),
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_nobody_reads_is_left_out_and_named(
    tmp_path: Path, expected: dict[str, bytes], name: str, prefix: str
) -> None:
    model = plain()
    model.tensors[name] = np.ones(LEFTOVERS[name], np.float32)
    model.prefix(prefix)
    found, notes = converted(write(tmp_path, model), tmp_path)
    assert found == expected["plain"]
    assert f"left out, since the language model reads none of them: '{prefix}{name}'" in notes


def only_head(m: Model) -> None:
    m.tensors[HEAD] = m.tensors.pop(EMBED)


TIED: dict[str, tuple[Change, str, str]] = {  # the change, the form, what is told
    "head only": (only_head, "safetensors", "lm_head.weight, to which config.json ties it, is read for both"),
    "head only, wrapped": (both(only_head, lambda m: m.prefix("module.")), "shards", "is read for both"),
    "the inner class": (inner_class, "safetensors", "inner class"),
    "the class LlamaModel": (
        both(inner_class, lambda m: m.config.update(architectures=["LlamaModel"])),
        "safetensors",
        "read as LlamaForCausalLM",
    ),
    "an index with the head": (
        lambda m: setattr(m, "index_also", (HEAD,)),
        "shards",
        "names 'lm_head.weight', which no shard holds",
    ),
    "one storage under two names": (lambda m: m.tensors.update({HEAD: m.tensors[EMBED]}), "bin", ""),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_pair_in_any_form_gives_the_tied_bytes(
    tmp_path: Path, expected: dict[str, bytes], case: str
) -> None:
    change, form, told = TIED[case]
    model = plain(tied=True)
    change(model)
    folder = write(tmp_path, model, form)
    if case.startswith("one storage"):
        share(folder / "pytorch_model.bin")
    found, notes = converted(folder, tmp_path)
    assert found == expected["tied"]
    assert told in notes


def share(path: Path) -> None:
    """The state dict as a tied model gives it: one tensor under two names."""
    import torch

    state = torch.load(path, weights_only=True)
    state[HEAD] = state[EMBED]
    torch.save(state, path)


# --- what transformers makes of the same folder ----------------------------------------------------------


def other_head(m: Model) -> None:
    m.tensors[HEAD] = m.tensors[EMBED][::-1].copy()


def mistral(m: Model) -> None:
    m.config.update(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None)


LOADED: dict[str, tuple[Callable[[], Model], Change]] = {
    "head only": (lambda: plain(tied=True), only_head),
    "a tied flag and two that differ": (lambda: plain(tied=True), other_head),
    "the inner class": (lambda: plain(tied=True), inner_class),
    "the inner class with a head": (plain, inner_class),
    "no bias on o": (biased, lambda m: None),
    "Mistral": (plain, mistral),
    "no architectures": (plain, lambda m: m.config.update(architectures=[])),
    "an old converter's name": (plain, lambda m: m.config.update(architectures=["LLaMAForCausalLM"])),
    "swish": (plain, lambda m: m.config.update(hidden_act="swish")),
    "buffers": (plain, lambda m: m.tensors.update({n: np.ones(LEFTOVERS[n], np.float32) for n in LEFTOVERS})),
}


@pytest.mark.parametrize("case", LOADED)
def test_the_weights_are_those_that_transformers_loads(tmp_path: Path, case: str) -> None:
    """Every parameter of transformers' model equals ours by name; logits of our blocks equal its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from dsconvert.decoder import torch_decoder as st

    make, change = LOADED[case]
    model = make()
    change(model)
    folder = write(tmp_path, model)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours, config = open_checkpoint(folder), load_config(folder)
    for name, parameter in loaded.state_dict().items():
        values = parameter.numpy()
        if name.endswith("o_proj.bias"):
            assert name not in ours.tensors
            assert not values.any()
        else:
            own = EMBED if name == HEAD and HEAD not in ours.tensors else name
            assert np.array_equal(ours.float32(own), values), name
    ids = np.arange(5, 25, dtype=np.int64)[None]
    decoder = st.open_decoder(ours, config, torch.device("cpu"), torch.float32)
    hidden = st.embed(st.read(decoder, EMBED), ids, torch.float32)
    for index in range(config.layers):
        hidden = st.run_block(decoder, st.load_block(decoder, index), hidden)
    found = st.logits(decoder, *st.head_weights(decoder), hidden[0])
    with torch.no_grad():
        wanted = loaded(torch.from_numpy(ids)).logits[0]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_o_without_a_bias_has_none_in_the_file(expected: dict[str, bytes], tmp_path: Path) -> None:
    from converters.gguf.parse import open_gguf

    (tmp_path / "x.gguf").write_bytes(expected["biased"])
    names = set(open_gguf(tmp_path / "x.gguf").tensors)
    assert {f"blk.{i}.attn_{letter}.bias" for i in range(2) for letter in "qkv"} <= names
    assert not any(name.endswith("attn_output.bias") for name in names)


def test_a_bias_on_o_in_one_layer_only_is_refused(tmp_path: Path) -> None:
    model = biased()
    model.tensors["model.layers.1.self_attn.o_proj.bias"] = tiny.encode(np.ones(64, np.float32), "bf16")
    text = refusal(write(tmp_path, model), tmp_path)
    assert "1 missing: 'model.layers.0.self_attn.o_proj.bias'" in text


# --- the class -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"architectures": []}, "read as LlamaForCausalLM"),
        ({"architectures": None}, ""),
        ({"architectures": ["LLaMAForCausalLM"]}, "read as LlamaForCausalLM"),
        ({"architectures": ["FSDPLlamaForCausalLM"]}, "read as LlamaForCausalLM"),
        ({"architectures": ["LlamaModel"]}, "read as LlamaForCausalLM"),
        ({"architectures": ["LlamaForCausalLM", "PeftModel"]}, "read as LlamaForCausalLM"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "read as LlamaForCausalLM"),  # its model type is llama
        ({"hidden_act": "swish"}, ""),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}, ""),
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, ""),  # 4096, and 512 tokens
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 16},
            "",
        ),
    ],
)
def test_the_class_by_any_of_its_names_gives_the_plain_bytes(
    tmp_path: Path, expected: dict[str, bytes], changes: dict[str, Any], told: str
) -> None:
    model = plain()
    model.config |= changes
    found, notes = converted(write(tmp_path, model), tmp_path)
    assert found == expected["plain"]
    assert told in notes
    assert bool(notes) == bool(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "'LlamaForSequenceClassification' has no table",
        ),
        ({"architectures": ["MyLlamaForCausalLM"], "auto_map": {"AutoModel": "x.Y"}}, "has no table"),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"},
            "'Qwen2MoeForCausalLM' has no",
        ),
        ({"architectures": [], "model_type": "qwen2_moe"}, "does not name one architecture"),
        (
            {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 256},
            "sliding_window",
        ),
        (
            {
                "architectures": ["MistralForCausalLM"],
                "model_type": "mistral",
                "max_position_embeddings": 8192,
            },
            "sliding_window is 4096",
        ),
    ],
)
def test_another_class_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    model = plain()
    model.config |= changes
    assert told in refusal(write(tmp_path, model), tmp_path)


def test_the_classes_by_model_type_are_those_that_transformers_takes() -> None:
    from transformers.models.auto import modeling_auto as auto

    taken = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES | auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    own = {"multi_modality", "deepseek", "deepseek_vl_v2", "deepseek_ocr2_text"}  # code of the models' own
    for kind in set(BY_TYPE) - own:
        assert model_class({"model_type": kind}).name == taken[kind]


def test_absent_keys_of_a_mistral_config_are_transformers_defaults() -> None:
    from transformers import LlamaConfig, MistralConfig

    config, other = MistralConfig(), LlamaConfig()
    for key, value in ARCHITECTURES["MistralForCausalLM"].defaults.items():
        if key != "rope_theta":
            assert getattr(config, key) == value, key
    assert config.rope_parameters == other.rope_parameters


# --- a statement of quantization that the weights do not keep --------------------------------------------

BNB = {"load_in_4bit": True, "quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_a_left_over_quantization_config_is_told_and_ignored(
    tmp_path: Path, expected: dict[str, bytes], method: str
) -> None:
    model = plain()
    model.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    model.config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    found, notes = converted(write(tmp_path, model), tmp_path)
    assert found == expected["plain"]
    assert f"states the quantization '{method}', but every tensor is bf16" in notes


def test_a_method_that_works_in_the_forward_pass_is_no_left_over(tmp_path: Path) -> None:
    model = plain()
    model.config["quantization_config"] = {"quant_method": "bitnet", "quantization_mode": "online"}
    assert "is quantized already" in refusal(write(tmp_path, model), tmp_path)


def command(*words: object) -> str:
    done = CliRunner().invoke(cli, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def left_over(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in which everything is unusual: wrapped names, a left-over statement, a value head."""
    model = plain(d=128, ff=128, layers=1)
    model.config |= {"quantization_config": BNB, "architectures": ["LLaMAForCausalLM"]}
    model.tensors["v_head.summary.weight"] = np.ones((1, 128), np.float32)
    model.prefix("module.")
    return write(tmp_path_factory.mktemp("left"), model)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("clean"), plain(d=128, ff=128, layers=1))


CALIB = ("--calib", "builtin", "--calib-samples", "2", "--calib-len", "64", "--quiet")
FLAWS = ("wrapper", "v_head.summary.weight", "bitsandbytes", "read as LlamaForCausalLM")


@pytest.mark.parametrize(
    "words",
    [("gptq", "--group-size", "32"), ("exl2", "--bpw", "5", "--head-bits", "16")],
    ids=lambda words: str(words[0]),
)
def test_quantized_folders_are_the_same_and_carry_no_old_statement(
    tmp_path: Path, left_over: Path, clean: Path, words: tuple[str, ...]
) -> None:
    said = command(*words, left_over, *CALIB, "--out", tmp_path / "a", "--effort", "off")
    command(*words, clean, *CALIB, "--out", tmp_path / "b", "--effort", "off")
    for path in sorted((tmp_path / "b").iterdir()):
        assert (tmp_path / "a" / path.name).read_bytes() == path.read_bytes(), path.name
    assert all(flaw in said for flaw in FLAWS)
    assert "bitsandbytes" not in (tmp_path / "a" / "config.json").read_text()


def test_imatrix_verify_and_tokenizer_take_it(tmp_path: Path, left_over: Path, clean: Path) -> None:
    said = command("imatrix", left_over, *CALIB, "--outfile", tmp_path / "a.gguf")
    command("imatrix", clean, *CALIB, "--outfile", tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert all(flaw in said for flaw in FLAWS)
    command("gguf", clean, "--outfile", tmp_path / "m.gguf", "--quant", "q8_0", "--quiet")
    windows = ("--windows", "1", "--length", "32")
    said = command("verify", tmp_path / "m.gguf", "--against", left_over, *windows)
    assert all(flaw in said for flaw in FLAWS)
    said = command("compare", left_over, clean, "--against", clean, *windows)
    assert all(flaw in said for flaw in FLAWS)
    command("tokenizer", left_over, "--compare", clean, "--strings", "10")


def test_exllamav2s_own_converter_is_kept_from_what_it_would_misread(
    tmp_path: Path, left_over: Path, clean: Path
) -> None:
    asked: dict[str, Any] = {"calib": "builtin", "bpw": 5.0, "out": tmp_path / "out"}
    with pytest.raises(UsageError, match=r"looks for 'model\.embed_tokens"):
        backend.check_readable(exl2.prepare(calibrated.exl2_options(left_over, **asked)))
    raw = json.loads((clean / "config.json").read_text()) | {"rope_theta": 1e4}
    model = Model(open_checkpoint(clean).tensors, raw)
    model.tensors = {name: tensor.data for name, tensor in model.tensors.items()}
    folder = write(tmp_path, model)
    backend.check_readable(exl2.prepare(calibrated.exl2_options(folder, **asked)))
    tiny.write_json(folder / "config.json", {**raw, "quantization_config": BNB})
    with pytest.raises(UsageError, match="states the quantization 'bitsandbytes'"):
        backend.check_readable(exl2.prepare(calibrated.exl2_options(folder, **asked)))


# --- what is refused, and what helps ---------------------------------------------------------------------


def lora(m: Model) -> None:
    stem = "model.layers.0.self_attn.q_proj."
    m.tensors[stem + "base_layer.weight"] = m.tensors.pop(stem + "weight")
    for letter in "AB":
        m.tensors[f"{stem}lora_{letter}.default.weight"] = np.ones((8, 64), np.float32)


def fused(m: Model) -> None:
    stem = "model.layers.0.self_attn."
    parts = [m.tensors.pop(f"{stem}{letter}_proj.weight") for letter in "qkv"]
    m.tensors[stem + "qkv_proj.weight"] = np.concatenate(parts)


def unflagged(m: Model) -> None:
    m.tensors |= biased().tensors


DOWN = "model.layers.0.mlp.down_proj.weight"
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "bitsandbytes 4-bit": (
        lambda m: m.tensors.update(
            {DOWN: np.zeros((99, 1), np.uint8), DOWN + ".absmax": np.zeros(9, np.uint8)}
        ),
        ("quantized already", "bitsandbytes 4-bit", "dequantize()"),
    ),
    "bitsandbytes 8-bit": (
        lambda m: m.tensors.update({DOWN.replace("weight", "SCB"): np.ones(64, np.float32)}),
        ("quantized already", "bitsandbytes 8-bit"),
    ),
    "fp8": (
        lambda m: m.tensors.update({DOWN + "_scale_inv": np.ones((1, 1), np.float32)}),
        ("quantized already", "fp8"),
    ),
    "LoRA": (lora, ("not merged", "merge_and_unload()")),
    "wrapped LoRA": (both(lora, lambda m: m.prefix("base_model.model.")), ("not merged",)),
    "fused": (fused, ("fused", "q_proj")),
    "unstated biases": (unflagged, ('Set "attention_bias" to true',)),
    "stated biases": (
        lambda m: m.config.update(attention_bias=True),
        ('"attention_bias" or "mlp_bias" to false',),
    ),
    "no head": (lambda m: m.tensors.pop(HEAD), ("'lm_head.weight'", '"tie_word_embeddings" to true')),
    "a reward model": (
        lambda m: m.tensors.update({"score.weight": np.ones((1, 64), np.float32)}),
        ("reward model",),
    ),
    "rows more": (lambda m: m.config.update(vocab_size=496), ('set "vocab_size" to 512',)),
    "rows fewer": (lambda m: m.config.update(vocab_size=528), ('set "vocab_size" to 512',)),
    "another MLP": (lambda m: m.config.update(intermediate_size=192), ('set "intermediate_size" to 160',)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_converted_is_named_with_what_helps(tmp_path: Path, case: str) -> None:
    change, told = REFUSED[case]
    model = plain()
    change(model)
    text = refusal(write(tmp_path, model), tmp_path)
    for part in told:
        assert part in text


@pytest.mark.parametrize(("key", "value"), [("vocab_size", 512), ("attention_bias", True)])
def test_the_hint_on_the_config_works(tmp_path: Path, key: str, value: Any) -> None:
    model = plain() if key == "vocab_size" else biased()
    model.config[key] = 496 if key == "vocab_size" else False
    folder = write(tmp_path, model)
    assert f'"{key}"' in refusal(folder, tmp_path)
    tiny.write_json(folder / "config.json", {**model.config, key: value})
    assert converted(folder, tmp_path)[0]


# --- which files -----------------------------------------------------------------------------------------


def test_an_index_without_its_files_gives_way_to_a_complete_set(
    tmp_path: Path, expected: dict[str, bytes]
) -> None:
    folder = write(tmp_path, plain(), "shards")
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "3 of 3 weight files are missing" in refusal(folder, tmp_path)
    tiny.write_bin(folder / "pytorch_model.bin", plain().tensors)
    found, notes = converted(folder, tmp_path)
    assert found == expected["plain"]
    assert "model.safetensors.index.json names weight files none of which is here" in notes
    tiny.write_weights(folder, plain().tensors, tiny.Tiny(shards=2))
    stale = {"weight_map": dict.fromkeys(plain().tensors, "model-00001-of-00009.safetensors")}
    tiny.write_json(folder / "model.safetensors.index.json", stale)
    assert [p.name for p in open_checkpoint(folder).files] == [
        f"model-0000{i}-of-00002.safetensors" for i in (1, 2)
    ]


def test_a_part_of_an_indexed_set_is_no_reason_to_take_another(tmp_path: Path) -> None:
    folder = write(tmp_path, plain(), "shards")
    (folder / "model-00002-of-00003.safetensors").unlink()
    tiny.write_bin(folder / "pytorch_model.bin", plain().tensors)
    assert "1 of 3 weight files are missing" in refusal(folder, tmp_path)


def test_files_of_any_names_are_one_model(tmp_path: Path, expected: dict[str, bytes]) -> None:
    folder = write(tmp_path, plain())
    (folder / "model.safetensors").unlink()
    tensors = list(plain().tensors.items())
    for name, part in (("a", tensors[::2]), ("b", tensors[1::2])):
        (folder / f"{name}.safetensors").write_bytes(tiny.safetensors_bytes(dict(part)))
    assert converted(folder, tmp_path)[0] == expected["plain"]
    (folder / "c.safetensors").write_bytes(tiny.safetensors_bytes(dict(tensors[:1])))
    assert "is in both" in refusal(folder, tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((".metadata", "__0_0.distcp"), ("FSDP", "dcp_to_torch")),
        (("zero_to_fp32.py", "latest"), ("DeepSpeed", "zero_to_fp32.py")),
        (("adapter_config.json", "adapter_model.safetensors"), ("adapter", "merge_and_unload()")),
        (("consolidated.00.pth", "params.json"), ("Meta", "convert_llama_weights_to_hf.py")),
    ],
)
def test_weights_in_another_form_are_named(
    tmp_path: Path, names: tuple[str, ...], told: tuple[str, ...]
) -> None:
    folder = write(tmp_path, plain())
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_text("{}")
    text = refusal(folder, tmp_path)
    assert all(part in text for part in told)


def test_64_bit_weights_give_the_bytes_of_the_32_bit_ones(tmp_path: Path) -> None:
    model = plain(dtype="f32")
    wanted = converted(write(tmp_path / "f32", model), tmp_path)[0]
    model.tensors = {name: value.astype(np.float64) for name, value in model.tensors.items()}
    for form in FORMS:
        folder = write(tmp_path / form, model, form)
        assert converted(folder, tmp_path)[0] == wanted
        checkpoint: Checkpoint = open_checkpoint(folder)
        assert checkpoint.dtype(EMBED) == "f64"
        assert np.array_equal(checkpoint.float32(EMBED), model.tensors[EMBED].astype(np.float32))
