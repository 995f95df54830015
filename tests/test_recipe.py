"""The type of every tensor against what llama.cpp's own quantizer chose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from converters.gguf import recipe
from converters.gguf.qtypes import QTYPES
from dsconvert.errors import UsageError

GOLDEN = Path(__file__).parents[2] / "shared" / "data" / "recipes" / "types.json"
LAYER_SHAPES = {
    "attn_q": ("q", "d"),
    "attn_k": ("kv", "d"),
    "attn_v": ("kv", "d"),
    "attn_output": ("d", "q"),
    "ffn_gate": ("ff", "d"),
    "ffn_up": ("ff", "d"),
    "ffn_down": ("d", "ff"),
}


def llama_shapes(
    layers: int, d: int, ff: int, heads: int, kv_heads: int, *, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama-layout GGUF file, whole-model tensors first."""
    dims = {"d": d, "q": d, "kv": d // heads * kv_heads, "ff": ff}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (1000, d), "output_norm.weight": (d,)}
    if not tied:
        shapes["output.weight"] = (1000, d)
    for i in range(layers):
        shapes[f"blk.{i}.attn_norm.weight"] = (d,)
        shapes |= {f"blk.{i}.{k}.weight": (dims[r], dims[c]) for k, (r, c) in LAYER_SHAPES.items()}
        shapes[f"blk.{i}.ffn_norm.weight"] = (d,)
        shapes[f"blk.{i}.attn_q.bias"] = (d,)
    return shapes


def golden_cases() -> list[Any]:
    if not GOLDEN.exists():
        return []
    return [
        pytest.param(
            case, quant, id=f"{case['layers']}x{case['embedding']}-{case['heads']}:{case['kv_heads']}-{quant}"
        )
        for case in json.loads(GOLDEN.read_text())["cases"]
        for quant in case["types"]
    ]


def unrolled(text: str) -> list[str]:
    """'a*2 b*1' -> [a, a, b]."""
    return [kind for run in text.split() for kind in [run.split("*")[0]] * int(run.split("*")[1])]


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"needs {GOLDEN.name}, llama.cpp's choices, in shared/data")
@pytest.mark.parametrize(("case", "quant"), golden_cases())
def test_types_are_those_that_llama_quantize_chose(case: dict[str, Any], quant: str) -> None:
    shapes = llama_shapes(
        case["layers"],
        case["embedding"],
        case["feed_forward"],
        case["heads"],
        case["kv_heads"],
        tied=case["tied"],
    )
    types = choose(quant, shapes, layers=case["layers"], heads=case["heads"], kv_heads=case["kv_heads"])
    assert set(types) == set(shapes)
    compared = 0
    for key, text in case["types"][quant].items():
        if key in LAYER_SHAPES:
            got = [types[f"blk.{i}.{key}.weight"] for i in range(case["layers"])]
            assert got == unrolled(text), key
            compared += case["layers"]
        else:
            assert types[f"{key}.weight"] == text
            compared += 1
    matrices = [name for name in shapes if recipe.is_quantized(name, shapes[name])]
    assert compared == len(matrices) == case["layers"] * 7 + (1 if case["tied"] else 2)
    assert all(types[name] == "f32" for name in shapes if name not in matrices)


def choose(quant: str, shapes: dict[str, tuple[int, ...]], **options: Any) -> dict[str, str]:
    return {name: choice.type for name, choice in recipe.choose(quant, shapes, **options).items()}


def assign(quant: str, **options: Any) -> dict[str, str]:
    return choose(quant, llama_shapes(8, 256, 512, 4, 4), layers=8, heads=4, kv_heads=4, **options)


@pytest.mark.parametrize("quant", ["f32", "f16", "bf16"])
def test_plain_types_hold_for_every_matrix(quant: str) -> None:
    types = assign(quant)
    assert types["output.weight"] == types["blk.3.ffn_down.weight"] == quant
    assert types["blk.3.attn_norm.weight"] == types["blk.3.attn_q.bias"] == "f32"


def test_pure_gives_every_matrix_the_default_type() -> None:
    types = assign("q4_k_m", pure=True)
    assert {kind for name, kind in types.items() if kind != "f32"} == {"q4_k"}
    narrow = choose("q4_k", llama_shapes(1, 96, 40, 3, 3), layers=1, heads=3, kv_heads=3, pure=True)
    assert narrow["output.weight"] == "q5_0"
    assert narrow["blk.0.ffn_down.weight"] == "f16"


def test_the_first_pattern_that_fits_wins() -> None:
    overrides = [(r"blk\.[01]\.ffn_down", "q8_0"), ("ffn_down", "f16"), ("^output", "q4_1")]
    types = assign("q4_0", overrides=overrides)
    assert [types[f"blk.{i}.ffn_down.weight"] for i in range(3)] == ["q8_0", "q8_0", "f16"]
    assert types["output.weight"] == "q4_1"
    assert types["output_norm.weight"] == "f32"
    assert types["blk.0.attn_output.weight"] == "q4_0"


def test_overridden_tensors_are_not_counted() -> None:
    """llama-quantize counts attn_v only where its own rules decide: q4_k_s raises the first four it meets."""
    types = assign("q4_k_s", overrides=[(r"blk\.1\.attn_v", "q8_0")])
    got = [types[f"blk.{i}.attn_v.weight"] for i in range(8)]
    assert got == ["q5_k", "q8_0", "q5_k", "q5_k", "q5_k", "q4_k", "q4_k", "q4_k"]


def test_overrides_fall_back_too_and_hold_for_plain_types() -> None:
    shapes = llama_shapes(1, 96, 64, 3, 3)
    options = {"layers": 1, "heads": 3, "kv_heads": 3}
    choice = recipe.choose("f16", shapes, overrides=[("attn_q", "q6_k")], **options)["blk.0.attn_q.weight"]
    assert choice == recipe.Choice("q8_0", "q6_k")
    assert choice.fell_back
    assert choose("f16", shapes, overrides=[("attn_q", "q6_k")], **options)["output.weight"] == "f16"


def test_an_importance_matrix_raises_the_first_eighth_of_ffn_down() -> None:
    assert assign("q4_0", imatrix=True)["blk.0.ffn_down.weight"] == "q4_1"
    assert assign("q4_0", imatrix=True)["blk.1.ffn_down.weight"] == "q4_0"
    assert assign("q5_0", imatrix=True)["blk.0.ffn_down.weight"] == "q5_1"
    assert assign("q4_0")["blk.0.ffn_down.weight"] == "q4_0"


def test_q2_k_s_follows_the_rules_of_llama_quantize() -> None:
    """Read from its source: the golden choices have no q2_k_s."""
    types = assign("q2_k_s", imatrix=True)
    downs = [types[f"blk.{i}.ffn_down.weight"] for i in range(8)]
    assert downs == ["q4_k", *["q2_k"] * 7]
    assert types["output.weight"] == "q6_k"
    assert {types[f"blk.{i}.{key}.weight"] for i in range(8) for key in LAYER_SHAPES} == {"q2_k", "q4_k"}
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(8)} == {types["token_embd.weight"]} == {"q2_k"}
    grouped = llama_shapes(8, 1024, 512, 8, 2)
    types = choose("q2_k_s", grouped, layers=8, heads=8, kv_heads=2, imatrix=True)
    assert {types[f"blk.{i}.attn_v.weight"] for i in range(8)} == {"q4_k"}


def test_q2_k_s_needs_an_importance_matrix_for_all_but_the_ends() -> None:
    with pytest.raises(UsageError, match="needs an importance matrix"):
        assign("q2_k_s")
    recipe.check_importance("q2_k_s", {"token_embd.weight": "q2_k", "blk.0.ffn_down.weight": "q4_k"})
    recipe.check_importance("q2_k", {"blk.1.ffn_up.weight": "q2_k"})
    with pytest.raises(UsageError, match=r"none that fits blk\.1\.ffn_up\.weight"):
        recipe.check_importance("q2_k_s", {"token_embd.weight": "q2_k", "blk.1.ffn_up.weight": "q2_k"})


def test_layers_are_counted_in_their_own_order() -> None:
    shapes = llama_shapes(24, 256, 512, 4, 4)
    backwards = dict(reversed(shapes.items()))
    numbers = {"layers": 24, "heads": 4, "kv_heads": 4}
    assert choose("q4_k_m", backwards, **numbers) == choose("q4_k_m", shapes, **numbers)


@pytest.mark.parametrize(
    ("quant", "overrides", "said"),
    [
        ("q9_9", (), "q9_9"),
        ("q4_0", (("ffn_dwn", "q8_0"),), "fits no weight matrix"),
        ("q4_0", (("attn_norm", "q8_0"),), "fits no weight matrix"),
        ("q4_0", (("ffn_(", "q8_0"),), "no regular expression"),
        ("q4_0", (("ffn_down", "q4_k_m"),), "q4_k_m"),
    ],
)
def test_what_makes_no_sense_is_refused(
    quant: str, overrides: tuple[tuple[str, str], ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        assign(quant, overrides=overrides)


def test_aliases_and_file_types() -> None:
    assert recipe.canonical("Q4_K") == "q4_k_m"
    assert recipe.default_type("q3_k") == "q3_k"
    assert recipe.FILE_TYPES["q4_0"] == 2
    assert len(set(recipe.FILE_TYPES.values())) == len(recipe.MIXTURES) == 18


def test_file_types_are_those_of_the_gguf_library() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf library")
    for name, number in recipe.FILE_TYPES.items():
        theirs = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
        assert theirs == name


def test_every_rule_names_a_known_type() -> None:
    for mixture in recipe.MIXTURES.values():
        rules = (*mixture.attn_v, *mixture.ffn_down, *mixture.attn_output)
        assert {mixture.default, *(kind for _, kind in rules)} <= set(QTYPES)
