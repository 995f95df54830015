"""How a token is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from dsconvert.chat.sampling import Sampling, draw, likeliest
from dsconvert.errors import ConversionError

LOGITS = np.log(np.array([0.1, 0.5, 0.05, 0.3, 0.05], np.float32)) + np.float32(7)


def drawn(sampling: Sampling, count: int = 4000) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """How often each token is drawn."""
    random = np.random.default_rng(0)
    return np.bincount([draw(LOGITS, sampling, random) for _ in range(count)], minlength=5) / count


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=0.01), Sampling(temperature=1e-3)]
)
def test_the_likeliest(sampling: Sampling) -> None:
    assert drawn(sampling, 50)[1] == 1


def test_all_tokens_by_their_probabilities() -> None:
    np.testing.assert_allclose(drawn(Sampling(1.0, 0, 1.0)), [0.1, 0.5, 0.05, 0.3, 0.05], atol=0.025)


def test_temperature_flattens() -> None:
    powers = np.array([0.1, 0.5, 0.05, 0.3, 0.05]) ** 0.5
    np.testing.assert_allclose(drawn(Sampling(2.0, 0, 1.0)), powers / powers.sum(), atol=0.025)


def test_the_k_likeliest() -> None:
    np.testing.assert_allclose(drawn(Sampling(1.0, 2, 1.0)), [0, 0.625, 0, 0.375, 0], atol=0.025)
    assert likeliest(LOGITS, 3).tolist() == [1, 3, 0]
    assert likeliest(LOGITS, 0).tolist() == likeliest(LOGITS, 99).tolist()


def test_the_likeliest_up_to_a_sum() -> None:
    """The token that reaches the sum is among them."""
    np.testing.assert_allclose(drawn(Sampling(1.0, 0, 0.79)), [0, 0.625, 0, 0.375, 0], atol=0.025)
    np.testing.assert_allclose(drawn(Sampling(1.0, 0, 0.81)), [1 / 9, 5 / 9, 0, 1 / 3, 0], atol=0.025)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_no_numbers(bad: float) -> None:
    with pytest.raises(ConversionError, match="gives no numbers"):
        draw(np.array([0.0, bad], np.float32), Sampling(), np.random.default_rng(0))


def test_a_token_that_cannot_be_is_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0], np.float32)
    random = np.random.default_rng(0)
    assert {draw(logits, Sampling(5.0, 0, 1.0), random) for _ in range(100)} == {0, 2}
