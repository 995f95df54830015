"""The file type that a file states against its tensors' types: true of every mixture, a lie is named."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from converters.gguf.claims import KEY, false_mixture
from converters.gguf.file_types import MIXTURES
from converters.gguf.mixtures import choose
from converters.gguf.parse import open_gguf
from dsconvert.cli import cli
from dsconvert.proof.thresholds import LIMITS

SIZES = {"narrow": (64, 160), "small": (256, 512), "SmolLM2": (576, 1536), "wide": (4096, 11008)}


def matrices(quant: str, d: int, ff: int, pure: bool = False) -> list[tuple[str, int]]:
    """Type and columns of each matrix of four blocks, as the mixture has them."""
    parts = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up"), d)
    parts["ffn_down"] = ff
    shapes = {
        f"blk.{layer}.{part}.weight": (d, columns) for layer in range(4) for part, columns in parts.items()
    }
    whole = {"token_embd.weight": (512, d), "output.weight": (512, d)}
    chosen = choose(quant, shapes | whole, layers=4, heads=4, kv_heads=2, pure=pure, imatrix=True)
    return [(chosen[name].type, columns) for name, (_, columns) in shapes.items()]


@pytest.mark.parametrize("pure", [False, True])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("quant", MIXTURES)
def test_every_mixture_is_what_it_says(quant: str, sizes: tuple[int, int], pure: bool) -> None:
    assert false_mixture(quant, matrices(quant, *sizes, pure)) == ""


@pytest.mark.parametrize(
    ("said", "made"),
    [("q2_k", "q8_0"), ("q8_0", "q2_k"), ("q4_0", "q4_k_m"), ("f16", "bf16"), ("q6_k", "q3_k_s")],
)
def test_a_lie_is_named_with_the_types_that_are_there(said: str, made: str) -> None:
    found = false_mixture(said, matrices(made, 256, 512))
    assert f"general.file_type says {said}, but no matrix of a block is " in found
    assert MIXTURES[made].default in found


def test_a_dense_model_may_say_the_type_of_experts_that_it_has_not() -> None:
    """As llama.cpp writes MXFP4_MOE of one."""
    assert false_mixture("mxfp4_moe", [("q8_0", 256)]) == ""
    assert false_mixture("mxfp4_moe", [("q4_0", 256)])


def test_some_matrices_of_other_types_by_name_are_no_lie() -> None:
    assert false_mixture("q4_0", [("q8_0", 256)] * 9 + [("q4_0", 256)]) == ""
    assert false_mixture("q4_0", []) == ""


def test_verify_names_a_false_file_type_and_judges_by_the_tensors(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "a.gguf"
    made = CliRunner().invoke(cli, ["gguf", "sample:", "-q", "q8_0", "-o", str(out), "--verify", "off"])
    assert made.exit_code == 0, made.output
    words = ["verify", str(out), "--against", "sample:", "--windows", "1", "--length", "64", "--json", "-"]
    data = bytearray(out.read_bytes())
    at = data.index(KEY.encode()) + len(KEY)
    assert struct.unpack_from("<II", data, at) == (4, 7)  # a uint32, MOSTLY_Q8_0
    struct.pack_into("<I", data, at + 4, MIXTURES["q2_k"].file_type)
    for content, code in ((out.read_bytes(), 0), (bytes(data), 3)):
        out.write_bytes(content)
        result = CliRunner().invoke(cli, words)
        assert result.exit_code == code, result.output
        found = json.loads(result.stdout)
        assert found["limits"]["max_kld"] == LIMITS["q8_0"].max_kld
    (failed,) = [check for check in found["checks"] if not check["passed"]]
    assert failed["name"] == "file type"
    assert failed["detail"] == f"{KEY} says q2_k, but no matrix of a block is q2_k: they are q8_0"


def test_overrides_that_leave_none_of_the_type_asked_for_make_another_file_type(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    out = tmp_path / "a.gguf"
    overrides = ["--tensor-type", "attn=q4_0", "--tensor-type", "ffn=q5_k"]
    made = CliRunner().invoke(cli, ["gguf", "sample:", "-q", "q8_0", *overrides, "-o", str(out)])
    assert made.exit_code == 0, made.output
    assert open_gguf(out).keys[KEY] == MIXTURES["q4_0"].file_type  # 8 of the 14 matrices
    some = ["--tensor-type", "attn=q4_0", "-o", str(tmp_path / "b.gguf")]
    assert CliRunner().invoke(cli, ["gguf", "sample:", "-q", "q8_0", *some]).exit_code == 0
    assert open_gguf(tmp_path / "b.gguf").keys[KEY] == MIXTURES["q8_0"].file_type
