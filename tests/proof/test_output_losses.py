"""The loss of a linear's outputs against plain rounding's: right by plain numpy, and judged."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from random_llama import Memory, make, plain, tokens

from converters.gguf.qtypes import QTYPES
from converters.gguf.rounding import nearest
from dsconvert.proof import compare, output_losses
from dsconvert.proof.checks import judge_tensors
from dsconvert.proof.figures import TensorError
from dsconvert.proof.output_losses import Losses, rounded
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
Floats = npt.NDArray[np.float32]
DOWN = "model.layers.1.mlp.down_proj.weight"


def inputs_of(model: object, name: str, ids: npt.NDArray[np.int64]) -> Floats:
    """What the linear is given, by transformers' own model."""
    seen: list[torch.Tensor] = []
    linear = model.get_submodule(name.removesuffix(".weight"))  # type: ignore[attr-defined]
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.from_numpy(ids))  # type: ignore[operator]
    handle.remove()
    found: Floats = torch.cat(seen).reshape(-1, linear.in_features).numpy()
    return found


def test_the_ratio_is_that_of_plain_numpy_on_the_references_inputs() -> None:
    model, source, config = make()
    ids = tokens(config, 2, 64)
    candidate = plain(source, "q4_0")
    shift = np.random.default_rng(0).standard_normal(candidate.tensors[DOWN].shape).astype(np.float32) * 0.01
    candidate.tensors[DOWN] = candidate.tensors[DOWN] + np.float32(1) * shift.astype(np.float32)
    found = compare.result(
        compare.compare(source, candidate, config, windows.whole(ids), device="cpu", dtype="float32")
    )
    X, W, Q = inputs_of(model, DOWN, ids), source.tensors[DOWN], candidate.tensors[DOWN]
    N = nearest(W, QTYPES["q4_0"])
    assert N is not None
    loss, least = (float(np.square(X.astype(np.float64) @ (made - W).T).sum()) for made in (Q, N))
    by_name = {t.name: t.loss for t in found.tensors}
    assert by_name[DOWN] == pytest.approx(loss / least, rel=1e-4)
    assert {name for name, ratio in by_name.items() if ratio is not None} == {DOWN}  # the others are N


def test_an_error_where_the_inputs_are_large_is_named_though_the_weights_lose_little() -> None:
    model, source, config = make()
    ids = tokens(config, 2, 64)
    candidate = plain(source, "q8_0")
    X, W, N = inputs_of(model, DOWN, ids), source.tensors[DOWN], candidate.tensors[DOWN]
    direction = np.linalg.svd(X, full_matrices=False)[2][0]
    candidate.tensors[DOWN] = N + 0.5 * np.linalg.norm(N - W, axis=1)[:, None] * direction
    found = compare.result(compare.compare(source, candidate, config, windows.whole(ids), device="cpu"))
    by_name = {t.name: t for t in found.tensors}
    assert by_name[DOWN].lost == pytest.approx(1.0, abs=0.3)
    (check,) = judge_tensors(found.tensors)
    assert not check.passed
    assert f"{DOWN}: signal to noise" in check.detail
    assert "its outputs' error is " in check.detail
    assert "times that of rounding to q8_0 to nearest, limit 2" in check.detail


def test_a_fair_candidate_says_its_largest_loss() -> None:
    _, source, config = make()
    candidate = plain(source, "q8_0")
    candidate.tensors[DOWN] = candidate.tensors[DOWN] * np.float32(1.0005)
    text = windows.whole(tokens(config, 2, 64))
    found = compare.result(compare.compare(source, candidate, config, text, device="cpu"))
    (check,) = judge_tensors(found.tensors)
    assert check.passed
    assert f"times the rounded ones' at most ({DOWN}, limit 2)" in check.detail


def test_no_more_tokens_than_enough_count() -> None:
    W = torch.eye(4)
    losses = Losses()
    errors = output_losses.errors_of(W, W * 2, np.eye(4, dtype=np.float32) * 3)
    losses.watch("x", lambda: iter([errors]))
    for _ in range(3):
        losses.observers["x"](torch.ones(1, 400, 4))
    assert losses.sums["x"] == [4.0 * output_losses.ENOUGH, 16.0 * output_losses.ENOUGH]
    assert losses.ratio("x") == 0.25


@pytest.mark.parametrize(("same", "count"), [(True, 300), (False, 64)])
def test_all_rows_are_rounded_only_where_the_first_are_the_candidates(
    monkeypatch: pytest.MonkeyPatch, same: bool, count: int
) -> None:
    monkeypatch.setattr(output_losses, "AT_FIRST", 64)
    monkeypatch.setattr(output_losses, "AT_ONCE", 70 * 32)
    W = torch.from_numpy(np.random.default_rng(1).standard_normal((300, 32)).astype(np.float32))
    source = Memory({"w": W.numpy()}, "q4_0")
    whole = nearest(W.numpy(), QTYPES["q4_0"])
    assert whole is not None
    Q = torch.from_numpy(whole.copy())
    if not same:
        Q[5] += 0.1
    made = rounded(source, "w", 0, W, Q)
    assert made is not None
    assert np.array_equal(made, whole[:count])


@pytest.mark.parametrize(
    ("lost", "loss", "passes"), [(3.6, 0.8, True), (3.6, 1.2, False), (3.6, None, False), (5.2, 0.8, False)]
)
def test_weights_may_lose_more_where_their_outputs_are_none_the_worse(
    lost: float, loss: float | None, passes: bool
) -> None:
    """Of SmolLM2's weights, which a 4-bit file's were, an importance matrix loses 3.6 dB in q4_k."""
    tensor = TensorError(DOWN, "q4_k", (576, 1536), 30.8, 576, lost=lost, loss=loss)
    (check,) = judge_tensors((tensor,))
    assert check.passed == passes
    assert f"limit {5 if loss == 0.8 else 3} dB" in check.detail or passes
