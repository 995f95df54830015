"""What exllamav2 can run, the groups that a setting makes, and what they cost."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest

from converters.exl2.pack import pack
from converters.exl2.settings import (
    BITS,
    HEADS,
    SETTINGS,
    Group,
    Setting,
    bits_of,
    groups_for,
    padded,
    settings_for,
)
from converters.exl2.shapes import HEAD_WEIGHT, RULES, WHOLE, broken_rules, check_shapes
from dsconvert.errors import QuantizationError, UsageError

PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"
EVERY = [*(s for ladder in SETTINGS.values() for s in ladder), *HEADS.values()]
NAME = "model.layers.3.mlp.down_proj.weight"


# The linears of DeepSeek LLM 7B and 67B, of DeepSeek-VL 1.3B and of SmolLM2-135M: [outputs, inputs].
RUNNABLE = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (1024, 8192), (22016, 8192))
RUNNABLE += ((8192, 22016), (2048, 2048), (5632, 2048), (2048, 5632), (576, 576), (192, 576), (576, 1536))


def test_every_deepseek_runs() -> None:
    linears: dict[str, tuple[int, ...]] = {f"model.layers.{i}.x.weight": s for i, s in enumerate(RUNNABLE)}
    linears[HEAD_WEIGHT] = (102400, 4096)
    assert not list(broken_rules(linears))
    check_shapes(linears)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((64, 48), "inputs are a multiple of 32"),
        ((64, 65536), "inputs are 65535 at the most"),
        ((48, 64), "outputs are a multiple of 32"),
    ],
)
def test_each_rule_is_refused_by_name(shape: tuple[int, int], words: str) -> None:
    linears = {"model.layers.0.x.weight": (128, 128), NAME: shape}
    with pytest.raises(QuantizationError, match=words) as caught:
        check_shapes(linears)
    assert NAME in str(caught.value)
    broken = list(broken_rules(linears))
    assert [name for _, name in broken] == [NAME]
    assert words in broken[0][0].text


def test_the_head_is_padded_and_may_stay() -> None:
    check_shapes({HEAD_WEIGHT: (1001, 64)})
    with pytest.raises(QuantizationError, match="--head-bits 16"):
        check_shapes({HEAD_WEIGHT: (1001, 48)})
    check_shapes({NAME: (64, 64)}, others=[HEAD_WEIGHT])
    assert len(RULES) == 3


@pytest.mark.parametrize("kind", WHOLE)
def test_attention_and_mlp_are_quantized_whole(kind: str) -> None:
    module = {"attention": "self_attn", "MLP": "mlp"}[kind]
    names = [f"model.layers.0.{module}.{member}.weight" for member in WHOLE[kind]]
    other = "model.layers.1.self_attn.q_proj.weight"
    check_shapes(dict.fromkeys(names, (64, 64)), others=[other])
    for left in names:
        some = {name: (64, 64) for name in names if name != left}
        with pytest.raises(QuantizationError, match=left) as caught:
            check_shapes(some, others=[left])
        assert kind in str(caught.value)


def test_what_is_no_linear_is_refused() -> None:
    for name, shape in (("a.weight", (64,)), ("a.bias", (64, 64)), ("a.weight", (0, 64))):
        with pytest.raises(QuantizationError, match="not the weight of a linear"):
            check_shapes({name: shape})


def test_groups_of_a_setting() -> None:
    setting = Setting((5, 4), (10, 90), (128, 128))
    assert groups_for(512, setting) == (Group(5, 128), *[Group(4, 128)] * 3)
    assert groups_for(576, setting) == (Group(5, 128), *[Group(4, 128)] * 3, Group(4, 64))
    assert groups_for(128, setting) == (Group(5, 128),)  # nothing is left for the narrow codes
    assert groups_for(96, setting) == (Group(5, 96),)
    hot = Setting((8, 4), (5, 95), (32, 128))
    assert groups_for(768, hot) == (*[Group(8, 32)] * 2, *[Group(4, 128)] * 5, Group(4, 64))
    exact = Setting((4, 3), (10, 90), (32, 32))  # 320 * 0.1 is a whole group, in floating point maybe more
    assert groups_for(320, exact) == (Group(4, 32), *[Group(3, 32)] * 9)


@pytest.mark.parametrize("inputs", [32, 64, 256, 576, 1536, 4096, 11008, 65504])
def test_groups_of_every_candidate_are_what_the_runtime_takes(inputs: int) -> None:
    for setting in EVERY:
        groups = groups_for(inputs, setting)
        assert sum(rows for _, rows in groups) == inputs
        assert [bits for bits, _ in groups] == sorted((bits for bits, _ in groups), reverse=True)
        assert all(bits in BITS and rows % 32 == 0 and 0 < rows <= 128 for bits, rows in groups)
        for bits, section in groupby(groups[:-1], key=lambda group: group.bits):
            size = setting.sizes[setting.bits.index(bits)]
            assert {rows for _, rows in section} == {size}  # only the very last group is short
        words = [bits * rows // 32 for bits, rows in groups]
        assert sum(words[:-1]) <= 32767


@pytest.mark.parametrize("setting", EVERY, ids=lambda setting: setting.text)
def test_a_candidate_costs_what_its_tensors_hold(setting: Setting) -> None:
    inputs, outputs = 288, 40
    groups = groups_for(inputs, setting)
    zeros = np.zeros((inputs, outputs), np.uint8)
    ones = np.ones(len(groups), np.float16)
    packed = pack(zeros, groups, zeros[: len(groups)], ones, np.arange(inputs))
    stored = 8 * sum(array.nbytes for array in packed.tensors("x").values())
    assert bits_of(inputs, outputs, groups) == stored
    assert bits_of(inputs, outputs, groups, bias=True) == stored + 16 * padded(outputs)


def test_ladders_go_from_two_to_eight_bits() -> None:
    assert {role: len(ladder) for role, ladder in SETTINGS.items()} == {
        "qkv": 19,
        "o": 19,
        "gate_up": 17,
        "down": 17,
    }
    for role, ladder in SETTINGS.items():
        inputs = 11008 if role == "down" else 4096
        rungs = [bits_of(inputs, 4096, groups_for(inputs, s)) / inputs / 4096 for s in ladder]
        assert rungs == sorted(rungs)
        assert 2.0 < rungs[0] < 2.3
        assert 8.0 < rungs[-1] < 8.1
        assert max(b - a for a, b in pairwise(rungs[:-1])) < 0.75
    heads = {n: round(bits_of(4096, 32000, groups_for(4096, s)) / 4096 / 32000, 2) for n, s in HEADS.items()}
    assert heads == {2: 2.74, 3: 3.28, 4: 4.44, 5: 5.19, 6: 6.34, 8: 8.03}  # the runtime's own


def test_candidates_that_are_the_same_are_tried_once() -> None:
    for role, ladder in SETTINGS.items():
        assert settings_for(role, 4096) == ladder
        few = settings_for(role, 64)
        assert len({groups_for(64, setting) for setting in few}) == len(few) < len(ladder)
        assert {groups_for(64, s) for s in few} == {groups_for(64, s) for s in ladder}


def test_settings_that_are_no_exl2_are_refused() -> None:
    for setting in (
        Setting((), (), ()),
        Setting((7,), (100,), (64,)),
        Setting((4, 5), (10, 90), (64, 64)),
        Setting((4, 4), (10, 90), (64, 64)),
        Setting((4,), (90,), (64,)),
        Setting((5, 4), (100, 0), (64, 64)),
        Setting((4,), (100,), (48,)),
    ):
        with pytest.raises(UsageError, match="not an EXL2 setting"):
            groups_for(256, setting)
    assert Setting((5, 4), (10, 90), (64, 128)).text == "5b10%g64+4b90%g128"
    assert len({setting.text for setting in EVERY}) == len(set(EVERY))


def test_the_heads_of_exllamav2_have_our_groups() -> None:
    path = PEERS / "exl2_4.2bpw" / "output.safetensors"
    if not path.exists():
        pytest.skip("needs the peers' files, exl2_4.2bpw")
    from safetensors.numpy import load_file

    tensors = load_file(path)
    for linear, setting in {
        "lm_head": HEADS[6],
        "model.layers.0.self_attn.q_proj": Setting((4,), (100,), (128,)),
        "model.layers.0.mlp.up_proj": Setting((4,), (100,), (32,)),
        "model.layers.2.mlp.down_proj": Setting((8, 4), (5, 95), (32, 128)),
    }.items():
        groups = groups_for(len(tensors[f"{linear}.q_invperm"]), setting)
        assert [bits for bits, _ in groups] == tensors[f"{linear}.q_groups"][0::2].tolist()
        first = np.cumsum([0, *(bits * rows // 32 for bits, rows in groups)])
        assert first[:-1].tolist() == tensors[f"{linear}.q_groups"][1::2].tolist()
        assert first[-1] == len(tensors[f"{linear}.q_weight"])
