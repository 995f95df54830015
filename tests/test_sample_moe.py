"""The embedded sample with experts: its files agree, it is trained, every expert has its part in it."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from agreement import TOKENS, divergence, engine_logits, file_of, logits
from click.testing import CliRunner
from rewrite import edited
from safetensors import safe_open

import dsconvert
from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.models.config import load_config, load_json
from dsconvert.texts.builtin import evaluation_page
from tokenizer_tools.load import load_tokenizer

FOLDER = Path(dsconvert.__file__).parent / "sample_moe"
EXPERTS, USED = 12, 2
BITS = 2.5  # per byte of held-out text: what its tokens' own frequencies give is 2.6
LEAST, MOST = 0.02, 0.25  # an expert's share of the tokens
runtime = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)


def command(*words: object, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_its_files_are_a_checkpoint_with_the_tokenizer_of_the_other_sample() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (FOLDER / name).read_bytes() == (FOLDER.with_name("sample") / name).read_bytes()
    with safe_open(FOLDER / "model.safetensors", "numpy") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 - no mapping
        assert {s.get_dtype() for s in slices} == {"BF16"}
    assert (FOLDER / "model.safetensors").stat().st_size < 7_000_000


def test_its_sizes_are_those_that_find_mistakes() -> None:
    """Whole k-quant blocks but where V2-Lite has none, and not eight experts, which have own rules."""
    config, raw = load_config(FOLDER), load_json(FOLDER / "config.json")
    assert (raw["n_routed_experts"], raw["num_experts_per_tok"]) == (EXPERTS, USED)
    assert not config.tied
    whole = ("hidden_size", "intermediate_size", "kv_lora_rank", "q_lora_rank")
    assert not any(raw[name] % 256 for name in whole)
    assert raw["moe_intermediate_size"] % 256
    assert raw["moe_intermediate_size"] * raw["n_shared_experts"] % 256 == 0
    assert raw["qk_nope_head_dim"] != raw["v_head_dim"]


@dataclass(frozen=True)
class Text:
    """Held-out text: its ids behind BOS, the bytes that they stand for, and the checkpoint's logits."""

    ids: npt.NDArray[np.int64]
    nbytes: int
    logits: npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def text() -> Text:
    pytest.importorskip("transformers")
    tokenizer = load_tokenizer(FOLDER, load_config(FOLDER).vocab_size)
    ids = np.array([tokenizer.bos_id, *tokenizer.encode([evaluation_page(2000)])[0]][:TOKENS])
    nbytes = len(tokenizer.tokenizer.decode(ids[1:].tolist()).encode())
    return Text(ids, nbytes, logits(FOLDER, ids))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("moe") / "matrix.gguf"
    command(
        "imatrix", "sample-moe:", "--calib", "builtin", "--calib-samples", 16, "--calib-len", 256, "-o", out
    )
    return out


@pytest.fixture(scope="module")
def q4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return file_of(FOLDER, tmp_path_factory.mktemp("moe") / "q4.gguf", "q4_k_m")


def test_it_predicts_held_out_text(text: Text) -> None:
    top = text.logits.max(-1)
    logs = text.logits - (top + np.log(np.exp(text.logits - top[:, None]).sum(-1)))[:, None]
    nats = -logs[np.arange(len(text.ids) - 1), text.ids[1:]].sum()
    assert nats / math.log(2) / text.nbytes < BITS


def test_every_expert_has_its_share_of_the_tokens(matrix: Path) -> None:
    counts = open_gguf(matrix).tensors["blk.1.ffn_gate_exps.weight.counts"].float32().reshape(-1)
    assert (counts.size, counts.sum()) == (EXPERTS, 16 * 256 * USED)
    assert LEAST < counts.min() / counts.sum() < counts.max() / counts.sum() < MOST


@runtime
def test_fewer_bits_cost_more_and_importance_costs_less(
    text: Text, matrix: Path, q4: Path, tmp_path: Path
) -> None:
    """By what llama.cpp computes of each file."""
    weighted = ("-q", "q2_k", "--imatrix", matrix, "--effort", "off", "-o", tmp_path / "weighted.gguf")
    command("gguf", "sample-moe:", *weighted)
    # kv_b's keys lie across the file's blocks: importance may round a row of them by 2 % of its length.
    command("verify", weighted[-1], "--against", "sample-moe:", "--windows", 1, "--length", 128)
    files = [
        file_of(FOLDER, tmp_path / "q8_0.gguf", "q8_0"), q4, tmp_path / "weighted.gguf",
        file_of(FOLDER, tmp_path / "q2_k.gguf", "q2_k"),
    ]  # fmt: skip
    costs = [divergence(text.logits, engine_logits(file, text.ids)) for file in files]
    assert sorted(costs) == costs
    assert costs[0] < 0.002
    assert costs[2] < 0.95 * costs[3]


def test_two_experts_in_each_others_place_are_found(q4: Path, tmp_path: Path) -> None:
    """All three matrices of both, so that nothing but their place in the router's order is wrong."""
    file, stored = open_gguf(q4), {}
    for kind in ("gate", "up", "down"):
        name = f"blk.1.ffn_{kind}_exps.weight"
        blocks = np.array(file.tensors[name].blocks()).reshape(EXPERTS, -1)
        blocks[[2, 9]] = blocks[[9, 2]]
        stored[name] = blocks
    bad = edited(file, tmp_path / "x.gguf", {}, stored=stored)
    told = command("verify", bad, "--against", "sample-moe:", "--windows", 1, "--length", 128, code=3)
    for expert in (2, 9):
        assert f"FAIL weights model.layers.1.mlp.experts.{expert}." in told


def test_a_file_of_the_form_before_april_2025_is_refused_by_what_it_is(q4: Path, tmp_path: Path) -> None:
    keys = {f"deepseek2.attention.{kind}_length_mla": None for kind in ("key", "value")}
    old = edited(open_gguf(q4), tmp_path / "old.gguf", keys)
    told = command("verify", old, "--against", "sample-moe:", code=2)
    assert "holds latent attention in a form of before April 2025" in told
    assert "deepseek2.attention.key_length_mla" in told


@runtime
def test_llama_cpp_runs_it_as_predicted(q4: Path) -> None:
    told = command(
        "verify", q4, "--against", "sample-moe:", "--windows", 1, "--length", 256, "--engine", "llama.cpp"
    )
    assert "ok engine parity" in told
    assert "went to other experts in 1 layer" in told
