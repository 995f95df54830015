"""The type of every tensor against what llama.cpp's own quantizer chose."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import moe_types
import pytest

from converters.gguf import mixtures
from converters.gguf.file_types import FILE_TYPES, MIXTURES
from converters.gguf.qtypes import QTYPES
from dsconvert.errors import UsageError
from dsconvert.models.architectures.llama import LLAMA

GOLDEN = Path(__file__).parents[3] / "shared" / "data" / "recipes" / "types.json"
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
    numbers = {"layers": case["layers"], "heads": case["heads"], "kv_heads": case["kv_heads"]}
    types = choose(quant, shapes, **numbers, wide=LLAMA.wide_values(SimpleNamespace(**numbers)))
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
    matrices = [name for name in shapes if mixtures.is_quantized(name, shapes[name])]
    assert compared == len(matrices) == case["layers"] * 7 + (1 if case["tied"] else 2)
    assert all(types[name] == "f32" for name in shapes if name not in matrices)


MOE = moe_types.load()


@pytest.mark.parametrize("name", MOE["cases"])
def test_types_of_experts_and_latent_attention_are_those_that_llama_quantize_chose(name: str) -> None:
    """28 mixtures each, those that need an importance matrix with one; see benchmarks/moe_types.py."""
    case, shapes = MOE["cases"][name], moe_types.shapes(MOE["cases"][name])
    numbers = {"layers": case["layers"], "heads": case["heads"], "experts": case.get("experts", 0)}
    numbers["kv_heads"] = 1 if "kv_lora" in case else case["kv_heads"]
    wide = case["layers"] == 80  # of Qwen2's and Llama's layouts
    assert len(MOE["types"][name]) == 28
    for quant, digest in MOE["types"][name].items():
        types = choose(quant, shapes, **numbers, wide=wide, imatrix=mixtures.needs_importance(quant))
        assert moe_types.digest(types) == digest, quant


def test_a_router_is_never_quantized() -> None:
    shapes = {"blk.0.ffn_gate_inp.weight": (16, 256), "blk.0.ffn_gate_exps.weight": (16, 256, 256)}
    options = {"layers": 1, "heads": 1, "kv_heads": 1, "experts": 16}
    for quant in ("f16", "bf16", "q8_0", "q4_k_m"):
        types = choose(quant, shapes, **options)
        assert types["blk.0.ffn_gate_inp.weight"] == "f32"
        assert types["blk.0.ffn_gate_exps.weight"] == mixtures.default_type(quant)


def choose(quant: str, shapes: dict[str, tuple[int, ...]], **options: Any) -> dict[str, str]:
    return {name: choice.type for name, choice in mixtures.choose(quant, shapes, **options).items()}


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
    choice = mixtures.choose("f16", shapes, overrides=[("attn_q", "q6_k")], **options)["blk.0.attn_q.weight"]
    assert choice == mixtures.Choice("q8_0", "q6_k")
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
    mixtures.check_importance("q2_k_s", {"token_embd.weight": "q2_k", "blk.0.ffn_down.weight": "q4_k"})
    mixtures.check_importance("q2_k", {"blk.1.ffn_up.weight": "q2_k"})
    with pytest.raises(UsageError, match=r"none that fits blk\.1\.ffn_up\.weight"):
        mixtures.check_importance("q2_k_s", {"token_embd.weight": "q2_k", "blk.1.ffn_up.weight": "q2_k"})


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
        ("q4_0", (("ffn_(", "q8_0"),), "not a regular expression"),
        ("q4_0", (("ffn_down", "q4_k_m"),), "q4_k_m"),
    ],
)
def test_what_makes_no_sense_is_refused(
    quant: str, overrides: tuple[tuple[str, str], ...], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        assign(quant, overrides=overrides)


def test_aliases_and_file_types() -> None:
    assert mixtures.canonical("Q4_K") == "q4_k_m"
    assert mixtures.default_type("q3_k") == "q3_k"
    assert FILE_TYPES["q4_0"] == 2
    assert len(set(FILE_TYPES.values())) == len(MIXTURES) == 32


def test_file_types_are_those_of_the_gguf_library() -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf library")
    for name, number in FILE_TYPES.items():
        theirs = gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_").lower()
        assert theirs == name


def test_every_rule_names_a_known_type() -> None:
    for mixture in MIXTURES.values():
        rules = [rule for role in LAYER_SHAPES for rule in mixture.rule(role)]
        named = {mixture.default, mixture.output, mixture.embedding or mixture.default}
        assert {*named, *(kind for _, kind in rules)} <= set(QTYPES)


# What the rules of llama.cpp give 16 layers with a matrix; attn_v with one and four heads on each kv head.
# The order is that of LAYER_SHAPES; 'a*2 b*1' is layer by layer.
IQ_CHOICES = {
    "iq4_nl": (
        "iq4_nl",
        "iq4_nl",
        "iq4_nl q5_k",
        "iq4_nl",
        "iq4_nl",
        "iq4_nl",
        "iq4_nl*16",
        "iq4_nl",
        "q6_k",
    ),
    "iq4_xs": (
        "iq4_xs",
        "iq4_xs",
        "iq4_xs q5_k",
        "iq4_xs",
        "iq4_xs",
        "iq4_xs",
        "iq4_xs*16",
        "iq4_xs",
        "q6_k",
    ),
    "iq3_m": ("iq3_s", "iq3_s", "q4_k q4_k", "q4_k", "iq3_s", "iq3_s", "q4_k*2 iq3_s*14", "iq3_s", "q6_k"),
    "iq3_s": ("iq3_s", "iq3_s", "iq3_s q4_k", "iq3_s", "iq3_s", "iq3_s", "iq3_s*16", "iq3_s", "q6_k"),
    "iq3_xs": (
        *("iq3_xxs", "iq3_xxs", "iq3_s q4_k", "iq3_s"),
        *("iq3_s*2 iq3_xxs*12 iq3_s*2", "iq3_s*2 iq3_xxs*12 iq3_s*2", "iq3_s*16", "iq3_s", "q6_k"),
    ),
    "iq3_xxs": (
        *("iq2_s", "iq2_s", "iq3_xxs q4_k", "iq3_s", "iq3_xxs", "iq3_xxs", "iq3_xxs*16", "iq3_s", "q5_k"),
    ),
    "iq2_m": ("iq2_s", "iq2_s", "iq3_s q4_k", "iq3_s", "iq2_s", "iq2_s", "iq3_s*2 iq2_s*14", "iq3_s", "q5_k"),
    "iq2_s": (
        *(
            "iq2_xs",
            "iq2_xs",
            "iq3_s q4_k",
            "iq3_s",
            "iq2_xs",
            "iq2_xs",
            "iq3_s*2 iq2_xs*14",
            "iq3_s",
            "q5_k",
        ),
    ),
    "iq2_xs": (
        *("iq2_xs", "iq2_xs", "q2_k q4_k", "iq2_xs", "iq2_xs", "iq2_xs", "q2_k*2 iq2_xs*14", "q2_k", "q5_k"),
    ),
    "iq2_xxs": (
        *("iq2_xxs", "iq2_xxs", "q2_k q4_k", "iq2_xxs", "iq2_xxs", "iq2_xxs", "q2_k*2 iq2_xxs*14"),
        *("q2_k", "q5_k"),
    ),
    "tq1_0": ("tq1_0", "tq1_0", "tq1_0 tq1_0", "tq1_0", "tq1_0", "tq1_0", "tq1_0*16", "q4_k", "q6_k"),
    "tq2_0": ("tq2_0", "tq2_0", "tq2_0 tq2_0", "tq2_0", "tq2_0", "tq2_0", "tq2_0*16", "q4_k", "q6_k"),
    "nvfp4": ("nvfp4", "nvfp4", "nvfp4 nvfp4", "nvfp4", "nvfp4", "nvfp4", "nvfp4*16", "nvfp4", "q6_k"),
    "mxfp4_moe": ("q8_0", "q8_0", "q8_0 q8_0", "q8_0", "q8_0", "q8_0", "q8_0*16", "q8_0", "q8_0"),
}


@pytest.mark.parametrize("quant", IQ_CHOICES)
def test_iq_tq_and_mxfp4_follow_the_rules_of_llama_quantize(quant: str) -> None:
    """Read from its source: the golden choices have none of them."""
    *layer, embedding, output = IQ_CHOICES[quant]
    v = list(LAYER_SHAPES).index("attn_v")
    for kv_heads, kind in zip((8, 2), layer[v].split(), strict=True):
        shapes = llama_shapes(16, 1024, 512, 8, kv_heads)
        types = choose(quant, shapes, layers=16, heads=8, kv_heads=kv_heads, imatrix=True)
        for role, expected in zip(LAYER_SHAPES, [*layer[:v], kind, *layer[v + 1 :]], strict=True):
            got = [types[f"blk.{i}.{role}.weight"] for i in range(16)]
            assert got == (unrolled(expected) if "*" in expected else [expected] * 16), role
        assert (types["token_embd.weight"], types["output.weight"]) == (embedding, output)
        tied = llama_shapes(16, 1024, 512, 8, kv_heads, tied=True)
        types = choose(quant, tied, layers=16, heads=8, kv_heads=kv_heads, imatrix=True)
        assert types["token_embd.weight"] == output


def test_without_a_matrix_some_layers_get_more() -> None:
    options: dict[str, Any] = {"layers": 16, "heads": 8, "kv_heads": 8}
    shapes = llama_shapes(16, 1024, 512, 8, 8)
    downs = [choose("iq4_xs", shapes, **options)[f"blk.{i}.ffn_down.weight"] for i in range(16)]
    assert downs == ["q5_k"] * 2 + ["iq4_xs"] * 14
    overrides = (("attn_[qk]", "iq3_s"), ("ffn_(gate|up)", "iq3_s"))
    types = choose("iq3_xxs", shapes, overrides=overrides, **options)
    downs = [types[f"blk.{i}.ffn_down.weight"] for i in range(16)]
    assert downs == ["q4_k"] * 2 + ["q3_k"] * 14
    assert types["blk.5.attn_v.weight"] == "iq3_s"


def test_eighty_layers_of_grouped_queries_raise_attn_v_but_in_the_smallest_files() -> None:
    shapes = llama_shapes(80, 1024, 512, 8, 1)
    options: dict[str, Any] = {"layers": 80, "heads": 8, "kv_heads": 1, "wide": True, "imatrix": True}
    assert choose("iq3_xs", shapes, **options)["blk.0.attn_v.weight"] == "q5_k"
    assert choose("iq2_m", shapes, **options)["blk.0.attn_v.weight"] == "q4_k"


def test_experts_are_what_mxfp4_is_for() -> None:
    shapes = {"blk.0.ffn_up_exps.weight": (4, 64, 32), "blk.0.ffn_up.weight": (64, 32)}
    types = choose("mxfp4_moe", shapes, layers=1, heads=1, kv_heads=1)
    assert types == {"blk.0.ffn_up_exps.weight": "mxfp4", "blk.0.ffn_up.weight": "q8_0"}
    assert set(choose("mxfp4_moe", shapes, layers=1, heads=1, kv_heads=1, pure=True).values()) == {"mxfp4"}


@pytest.mark.parametrize(
    ("quant", "columns", "expected"),
    [
        ("iq4_xs", 96, "iq4_nl"),
        ("iq3_s", 96, "iq4_nl"),
        ("iq2_xxs", 96, "iq4_nl"),
        ("tq1_0", 96, "q4_0"),
        ("tq2_0", 96, "q4_0"),
        ("iq4_nl", 40, "f16"),
        ("mxfp4_moe", 40, "f16"),
        ("nvfp4", 96, "f16"),
    ],
)
def test_rows_that_do_not_fit_fall_back(quant: str, columns: int, expected: str) -> None:
    shapes = llama_shapes(1, columns, 2 * columns, 1, 1)
    types = choose(quant, shapes, layers=1, heads=1, kv_heads=1, imatrix=True)
    assert types["blk.0.attn_q.weight"] == expected


NEEDY = ("iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "q2_k_s")


@pytest.mark.parametrize("quant", [*IQ_CHOICES, "q2_k_s", "q2_k", "q4_k_m"])
def test_what_needs_an_importance_matrix_says_so_and_how_to_make_one(quant: str) -> None:
    assert mixtures.needs_importance(quant) == (quant in NEEDY)
    if quant not in NEEDY:
        assert assign(quant)
        return
    with pytest.raises(UsageError, match=f"{quant} needs an importance matrix") as caught:
        assign(quant)
    assert "--calib" in caught.value.hint
    assert "dsconvert imatrix" in caught.value.hint


def test_an_override_may_need_a_matrix_too() -> None:
    with pytest.raises(UsageError, match="needs an importance matrix") as caught:
        assign("q4_k_m", overrides=[(r"blk\.3\.ffn_down", "iq2_xs")])
    assert "iq2_xs (blk.3.ffn_down.weight)" in caught.value.why
    # No matrix has data of the embedding: what can go without it may, what cannot may not.
    assert assign("q4_k_m", overrides=[("token_embd", "iq3_xxs")])["token_embd.weight"] == "iq3_xxs"
    with pytest.raises(UsageError, match="needs an importance matrix"):
        assign("q4_k_m", overrides=[("token_embd", "iq2_xs")])
    mixtures.check_importance("q4_k_m", {"token_embd.weight": "iq3_xxs", "blk.0.attn_q.weight": "iq3_s"})
    for lacking in ({"token_embd.weight": "iq2_xxs"}, {"blk.0.attn_q.weight": "iq2_s"}):
        with pytest.raises(UsageError, match="needs importance data"):
            mixtures.check_importance("q4_k_m", lacking)
