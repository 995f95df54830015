"""The llama.cpp engine, on a GGUF that gguf-py writes, against transformers and tokenizers."""

from __future__ import annotations

import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import smollm2
import tiny
from tokenizers import Tokenizer

from dsconvert.errors import ConversionError, UsageError
from dsconvert.runtimes import llama_h
from dsconvert.runtimes.llamacpp import CHUNK, Engine

SHARED = Path(__file__).parents[3] / "shared" / "data" / "vocab"
OPTIONS = tiny.Tiny(heads=4, kv_heads=2, dtype="f32")
TEXTS = (
    "The quick brown fox, in 1984!",
    "def f(x):\n    return x ** 2  # squared\n",
    "Gr\u00fc\u00dfe \u4f60\u597d\u4e16\u754c \U0001f600\t\r\n\n  \u00bd",
    "",
    " leading and trailing ",
)


@dataclass(frozen=True)
class Recipe:
    """What the test file holds; the defaults are a correct file."""

    pre: str | None = "deepseek-coder"
    interleave: bool = True
    leave_out: str = ""
    template: str = "{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("engine"), OPTIONS)


@pytest.fixture(scope="module")
def path(checkpoint: Path) -> Path:
    return write(checkpoint / "tiny.gguf", checkpoint)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine(path, n_ctx=1024, threads=1) as engine:
        yield engine


def write(path: Path, checkpoint: Path, recipe: Recipe = Recipe()) -> Path:
    """The tiny checkpoint as an F32 GGUF, by gguf-py's writer and the plain statement of the layout."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(OPTIONS.layers)
    writer.add_context_length(1024)
    writer.add_embedding_length(OPTIONS.d)
    writer.add_feed_forward_length(OPTIONS.ff)
    writer.add_head_count(OPTIONS.heads)
    writer.add_head_count_kv(OPTIONS.kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(OPTIONS.vocab)
    write_vocabulary(writer, json.loads((checkpoint / "tokenizer.json").read_text("utf-8")), recipe)
    for name, value in gguf_tensors(recipe.interleave).items():
        if name != recipe.leave_out:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any], recipe: Recipe) -> None:
    tokens = [f"[PAD{i}]" for i in range(OPTIONS.vocab)]
    types = [5] * OPTIONS.vocab
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], types[i] = token, 1
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], 3 if added["special"] else 4
    writer.add_tokenizer_model("gpt2")
    if recipe.pre is not None:
        writer.add_tokenizer_pre(recipe.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(tokens.index(tiny.BOS))
    writer.add_eos_token_id(tokens.index(tiny.EOS))
    writer.add_add_bos_token(True)
    writer.add_chat_template(recipe.template)


def gguf_tensors(interleave: bool) -> dict[str, npt.NDArray[np.float32]]:
    stems = {hf: stem for stem, hf in smollm2.NAMES.items()} | {"lm_head": "output"}
    found = {}
    for name, value in tiny.tiny_tensors(OPTIONS).items():
        layer, hf = None, name.removesuffix(".weight")
        if hf.startswith("model.layers."):
            _, _, layer, hf = hf.split(".", 3)
        stem = stems[hf]
        if interleave and stem in ("attn_q", "attn_k"):
            heads = OPTIONS.heads if stem == "attn_q" else OPTIONS.kv_heads
            stored = value.reshape(heads, 2, -1, OPTIONS.d).swapaxes(1, 2).reshape(value.shape)
        else:
            stored = value
        found[(f"blk.{layer}." if layer else "") + stem + ".weight"] = np.ascontiguousarray(stored)
    return found


def transformers_logits(checkpoint: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**json.loads((checkpoint / "config.json").read_text()))
    model = LlamaForCausalLM(config).eval()
    state = {name: torch.from_numpy(value) for name, value in tiny.tiny_tensors(OPTIONS).items()}
    model.load_state_dict(state)
    with torch.no_grad():
        logits: npt.NDArray[np.float32] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
    return logits


def mean_kl(p: npt.NDArray[np.float32], q: npt.NDArray[np.float32]) -> float:
    """KL(p || q) in nats, mean over the rows of logits."""
    a, b = (x.astype(np.float64) - x.max(-1, keepdims=True) for x in (p, q))
    a, b = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum(-1).mean())


def random_ids(n: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(7).integers(0, OPTIONS.vocab, n)


def test_logits_are_those_of_transformers(checkpoint: Path, engine: Engine) -> None:
    ids = random_ids(CHUNK + 41)
    ours, theirs = engine.logits(ids), transformers_logits(checkpoint, ids)
    assert ours.dtype == np.float32
    assert ours.shape == (len(ids), OPTIONS.vocab)
    assert mean_kl(theirs, ours) < 1e-10
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_file_without_the_rope_interleave_is_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.gguf", checkpoint, Recipe(interleave=False))
    ids = random_ids(64)
    with Engine(bad, threads=1) as engine:
        assert mean_kl(transformers_logits(checkpoint, ids), engine.logits(ids)) > 1e-6


def test_attention_runs_in_float32(engine: Engine) -> None:
    assert engine.arithmetic == {"keys": "f32", "values": "f32", "flash": "disabled"}


def test_each_call_is_a_fresh_sequence(engine: Engine) -> None:
    ids = random_ids(40)
    first = engine.logits(ids)
    engine.logits(ids[::-1])
    np.testing.assert_array_equal(engine.logits(ids), first)


def test_embeddings_stand_in_for_tokens(engine: Engine) -> None:
    ids = random_ids(30)
    table = tiny.tiny_tensors(OPTIONS)["model.embed_tokens.weight"]
    expected = engine.logits(ids)
    np.testing.assert_allclose(engine.logits(table[ids]), expected, atol=1e-5)
    np.testing.assert_allclose(engine.logits(ids[:7], table[ids[7:20]], ids[20:]), expected, atol=1e-4)


def test_token_ids_are_those_of_tokenizers(checkpoint: Path, path: Path, engine: Engine) -> None:
    theirs = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    with Engine(path, vocab_only=True) as vocabulary:
        for text in TEXTS:
            ids = theirs.encode(text, add_special_tokens=False).ids
            assert engine.tokenize(text) == vocabulary.tokenize(text) == ids, text
            assert engine.detokenize(ids) == text
        bos = theirs.token_to_id(tiny.BOS)
        assert bos is not None
        assert vocabulary.special == {"bos": bos, "eos": theirs.token_to_id(tiny.EOS), "add_bos": True}
        assert engine.tokenize("hi", add_special=True) == [bos, *engine.tokenize("hi")]
        assert engine.tokenize(tiny.BOS, parse_special=True) == [bos]
        assert engine.tokenize(tiny.BOS)[0] != bos
        assert (engine.detokenize([bos]), engine.detokenize([bos], special=False)) == (tiny.BOS, "")


@pytest.mark.parametrize("family", ["deepseek-llm", "deepseek-coder"])
def test_published_vocabularies_give_their_published_ids(family: str) -> None:
    stem = SHARED / f"ggml-vocab-{family}.gguf"
    if not stem.is_file():
        pytest.skip(f"needs llama.cpp's published vocabulary {stem.name} in ../shared/data/vocab")
    texts = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = Path(f"{stem}.out").read_text().splitlines()
    texts = texts[:-1]  # what follows the last separator
    assert len(texts) == len(lines) == 46
    with Engine(stem, vocab_only=True) as engine:
        for text, line in zip(texts, lines, strict=True):
            assert engine.tokenize(text) == [int(number) for number in line.split()]


def test_metadata_and_template_are_readable(engine: Engine) -> None:
    assert engine.meta["general.architecture"] == "llama"
    assert engine.meta["llama.block_count"] == str(OPTIONS.layers)
    assert engine.chat_template() == Recipe().template
    assert (engine.n_vocab, engine.n_embd, engine.n_ctx) == (OPTIONS.vocab, OPTIONS.d, 1024)


def test_what_does_not_fit_is_refused(path: Path, engine: Engine) -> None:
    for ids in ([], [0] * 1025, [OPTIONS.vocab], [-1], [0.5], np.zeros((3, 5), np.float32)):
        with pytest.raises(UsageError):
            engine.logits(np.asarray(ids))
    with pytest.raises(UsageError):
        engine.detokenize([OPTIONS.vocab])
    with Engine(path, vocab_only=True) as vocabulary, pytest.raises(UsageError, match="vocab_only"):
        vocabulary.logits([1])


def test_closing_twice_is_harmless(path: Path) -> None:
    with Engine(path, threads=1) as engine:
        engine.close()
    engine.close()


def test_a_missing_pre_tokenizer_is_a_warning(checkpoint: Path, engine: Engine, tmp_path: Path) -> None:
    assert engine.warnings == ()
    nameless = write(tmp_path / "nameless.gguf", checkpoint, replace(Recipe(), pre=None))
    with Engine(nameless, vocab_only=True) as vocabulary:
        assert "pre-tokenizer" in " ".join(vocabulary.warnings)


LOAD = """
import sys
from dsconvert.runtimes.llamacpp import Engine
from dsconvert.errors import ConversionError
try:
    Engine(sys.argv[1])
except ConversionError as error:
    print(error)
"""


def load_elsewhere(path: Path) -> str:
    """What a load prints in a process of its own, which must neither crash nor chatter."""
    command = [sys.executable, "-c", LOAD, str(path)]
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2], timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("nothing", ""),
        ("no GGUF", "magic"),
        ("cut", "not within the file bounds"),
        ("unknown pre-tokenizer", "unknown pre-tokenizer type: 'no-such'"),
        ("missing tensor", "tensor 'blk.1.ffn_up.weight' not found"),
        ("missing file", "is not a file"),
    ],
)
def test_a_bad_file_gives_llama_cpps_own_reason(
    fault: str, reason: str, path: Path, checkpoint: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    if fault == "nothing":
        bad = path
    elif fault == "no GGUF":
        bad.write_bytes(b"not a model at all" * 100)
    elif fault == "cut":
        bad.write_bytes(path.read_bytes()[:-5000])
    elif fault == "unknown pre-tokenizer":
        write(bad, checkpoint, replace(Recipe(), pre="no-such"))
    elif fault == "missing tensor":
        write(bad, checkpoint, replace(Recipe(), leave_out="blk.1.ffn_up.weight"))
    printed = load_elsewhere(bad)
    assert reason in printed
    assert printed.startswith(f"{bad}: ") == bool(reason)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install xllamacpp"):
        llama_h.open_library.__wrapped__()


def params(data: bytes) -> llama_h.Params:
    """A parameter struct; what lies after it in memory is arbitrary."""
    return llama_h.Params.from_buffer_copy(data.ljust(1024, b"\x7f"))


POINTERS = bytes(8) * 4
MODEL_LAYOUTS = {
    "use_mmap": (struct.pack("<2q4i", 0, 0, -1, 1, 0, 0), b"\0\1\0\0\0\1\0\0"),
    "load_mode": (struct.pack("<2q4i", 0, 0, -1, 1, -1, 0), b"\0\0\1\0\0\0\0\0"),
    "lazy_mode": (struct.pack("<2q6i", 0, 0, -1, 1, -1, 1, 0, 0x7F7F), b"\0\0\1\0\0\1\0\0"),
}


@pytest.mark.parametrize("layout", MODEL_LAYOUTS)
def test_vocab_only_is_found_in_every_known_layout(layout: str) -> None:
    head, flags = MODEL_LAYOUTS[layout]
    changed = params(head + POINTERS + flags)
    llama_h.set_vocab_only(changed)
    assert bytes(changed.raw)[: len(head) + 40] == head + POINTERS + b"\1" + flags[1:]


def test_vocab_only_in_an_unknown_layout_is_an_error() -> None:
    with pytest.raises(ConversionError, match="laid out"):
        llama_h.set_vocab_only(params(bytes(range(1, 255))))


@pytest.mark.parametrize("numbers", [8, 9])
def test_float32_attention_is_found_in_every_known_layout(numbers: int) -> None:
    def struct_bytes(flash: int, kind: int) -> bytes:
        head = struct.pack(f"<{numbers}i", 512, 2048, 512, 1, 0, 0, *([1, 4, 4][-(numbers - 6) :]))
        floats = struct.pack("<2f4fif", 0, 0, -1, -1, -1, -1, 0, -1)
        choices = head + struct.pack("<5i", 0, -1, -1, -1, flash) + floats
        choices += bytes(-len(choices) % 8)
        return choices + bytes(16) + struct.pack("<2i", kind, kind) + bytes(16) + b"\0\1\1\1\1\0\0\0"

    changed = params(struct_bytes(-1, 1))
    llama_h.set_float32_attention(changed)
    assert bytes(changed.raw) == bytes(params(struct_bytes(0, 0)).raw)
