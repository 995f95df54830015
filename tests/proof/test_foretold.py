"""What the errors of an output's weights foretell of its predictions, and that what they do not is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from random_llama import Memory, make, plain, stored, tokens

from dsconvert.models.config import ModelConfig
from dsconvert.proof import compare, numpy_compare
from dsconvert.proof.block_sample import compare_blocks
from dsconvert.proof.checks import judge, judge_blocks
from dsconvert.proof.effort import Effort
from dsconvert.proof.figures import BlockError
from dsconvert.proof.foretold import between, share
from dsconvert.proof.thresholds import LIMITS, Thresholds
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
ANY = Thresholds(math.inf, math.inf, math.inf)


def both_ways(
    source: Memory, candidate: Memory, config: ModelConfig, other: ModelConfig | None = None
) -> list[compare.Comparison]:
    """The comparison by torch, and by numpy."""
    text = windows.whole(tokens(config, 2, 64))
    effort = Effort(text, None, "")
    return [
        compare.result(
            compare.compare(source, candidate, config, text, candidate_config=other, device="cpu")
        ),
        compare.result(numpy_compare.compare_in_numpy(source, candidate, config, effort, other)),
    ]


def foretold_check(found: compare.Comparison) -> tuple[bool, float]:
    (check,) = [check for check in judge(found, ANY).checks if check.name == "foretold KLD"]
    assert check.value is not None
    return check.passed, check.value


def test_a_plain_output_is_what_is_foretold() -> None:
    _, source, config = make()
    for found in both_ways(source, plain(source, "q4_0"), config):
        assert found.figures is not None
        assert found.foretold is not None
        assert found.foretold.kld.value == pytest.approx(found.figures.kld.value, rel=1e-6)
        assert found.foretold.apart.value < 1e-9
        assert foretold_check(found)[0]
        assert all(block.foretold == pytest.approx(block.relative, rel=1e-5) for block in found.blocks)


@pytest.mark.parametrize("change", [{"rope_theta": 500.0}, {"norm_eps": 1e-2}])
@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q2_k"])
def test_what_the_config_changes_is_not_foretold(kind: str, change: dict[str, float]) -> None:
    _, source, config = make(hidden_size=256, intermediate_size=256)
    for found in both_ways(source, plain(source, kind), config, stored(config, **change)):
        passed, times = foretold_check(found)
        assert not passed, times
        wrong = [check.name for check in judge_blocks(found.blocks, ANY) if not check.passed]
        assert kind == "q2_k" or "block 2" in wrong  # whose own errors hide it there


@pytest.mark.parametrize("defect", ["attention removed", "two blocks swapped", "a head of noise"])
def test_what_a_wrong_matrix_changes_is_not_foretold(defect: str) -> None:
    _, source, config = make()
    right = plain(source, "q4_0").tensors
    wrong = dict(right)
    for name, array in right.items():
        if defect == "attention removed" and "o_proj" in name:
            wrong[name] = array * np.float32(0)
        if defect == "two blocks swapped" and ".layers.1." in name:
            other = name.replace(".layers.1.", ".layers.2.")
            wrong[name], wrong[other] = right[other], array
        if defect == "a head of noise" and name == "lm_head.weight":
            wrong[name] = np.random.default_rng(0).permutation(array)
    for found in both_ways(source, Memory(wrong, "q4_0"), config):
        passed, times = foretold_check(found)
        assert not passed
        assert times > 3


def test_errors_that_are_each_within_their_limit_are_too_much_together() -> None:
    """Every linear has 1.6 times the error of plain rounding: no weight is wrong, the whole is."""
    _, source, config = make()
    noise = np.random.default_rng(0)
    made = {}
    for name, array in plain(source, "q4_0").tensors.items():
        error, more = array - source.tensors[name], noise.standard_normal(array.shape).astype(np.float32)
        made[name] = array
        if array.ndim == 2 and "layers" in name:
            made[name] = array + more * np.float32(np.sqrt(0.6 * np.square(error).mean()))
    for found in both_ways(source, Memory(made, "q4_0"), config):
        passed, times = foretold_check(found)
        assert not passed
        assert 1.35 < times < 1.9
        assert all(check.passed for check in judge(found, ANY).checks if check.name == "weights")


@pytest.mark.parametrize("in_torch", [True, False])
def test_a_block_on_the_references_input_is_held_against_what_is_foretold(in_torch: bool) -> None:
    _, source, config = make()
    text, blocks = windows.whole(tokens(config, 1, 32)), (0, 1, 2)
    for other, right in ((config, True), (stored(config, rope_theta=100.0), False)):
        pair = source, plain(source, "q4_0"), config
        if in_torch:
            run = compare_blocks(*pair, text, blocks, candidate_config=other, device="cpu")
        else:
            run = numpy_compare.compare_in_numpy(*pair, Effort(text, blocks, ""), other)
        found = judge_blocks(compare.result(run).blocks, ANY)
        assert all(check.passed for check in found) == right
        said = "at most 1.00 times as large as" if right else "of its output"
        assert all(said in check.detail for check in found)


def test_no_more_of_an_error_is_foretold_than_plain_rounding_has() -> None:
    assert share("q4_0", 20.0, -1.0, 0.5) == 1
    assert share("q4_0", 10.0, 4.0, 4.0) == 0.5
    assert share("q4_0", 20.0, 1.0, None) == 1  # not run, and within its limit
    assert share("gptq4", 10.0, 4.0, 3.0) == 1  # of a linear with error feedback all within its limit
    assert share("gptq4", 10.0, 4.0, 4.0) == 0.5
    assert share("q4_k", 10.0, 4.0, None, fed=True) == 1
    assert share("q4_0", 10.0, 4.0, 2.3, fed=True) == 1
    assert share("q4_0", 10.0, 4.0, 4.0, fed=True) == 0.5
    assert share("q4_0", 0.0, 20.0, None) == pytest.approx(0.1)
    assert share("f16", 60.0, None, None) == 1
    assert share("f16", 0.0, None, None) == 0
    assert share("q4_0", math.nan, math.nan, math.nan) == 0
    assert share("q4_0", -math.inf, math.inf, math.inf) == 0
    base, candidate = np.float32([1, 2]), np.float32([2, 4])
    assert between(base, candidate, 0.0) is base
    assert between(base, candidate, 1.0) is candidate
    assert between(base, candidate, 0.25).tolist() == [1.25, 2.5]


def test_a_block_without_error_is_no_division() -> None:
    (check,) = judge_blocks((BlockError(0, 0.0, 1.0, foretold=0.0),), LIMITS["q4_0"])
    assert check.passed
    (check,) = judge_blocks((BlockError(3, 0.4, 0.9, foretold=0.2),), LIMITS["q4_0"])
    assert not check.passed
    said = "error of the states after it 0.4, the errors of the weights foretell 0.2, limit 1.2 times"
    assert check.detail == f"block 3: {said}"
