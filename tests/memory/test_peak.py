"""The memory formula against published peaks, and against plain sums on small cases."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from dsconvert.errors import UsageError
from dsconvert.memory.model import Decoder, Weights, decoder_of, stored_specs, weights_of
from dsconvert.memory.peak import Peak, longest, peak, share_out
from dsconvert.memory.runtimes import GIB, RUNTIMES
from dsconvert.models.config import normalise
from tests.support.published_memory import (
    CONFIG_7B,
    CONFIG_67B,
    CONFIG_V2_LITE,
    LENGTHS,
    OOM,
    PUBLISHED_7B,
    PUBLISHED_67B,
)


def in_16_bits(raw: dict[str, Any]) -> tuple[Decoder, Weights]:
    config = normalise(raw, "config.json")
    return decoder_of(config), weights_of(stored_specs(config), lambda spec: 2 * spec.values)


@pytest.mark.parametrize(
    ("raw", "cards", "published"),
    [(CONFIG_7B, 1, PUBLISHED_7B), (CONFIG_67B, 8, PUBLISHED_67B)],
    ids=["7B on one card", "67B on eight"],
)
def test_the_published_table_holds(
    raw: dict[str, Any], cards: int, published: dict[int, tuple[float | None, ...]]
) -> None:
    """Each figure within 10 %, and out of 40 GiB exactly where it was."""
    decoder, weights = in_16_bits(raw)
    shared, figures = share_out(weights, cards), 0
    for batch, row in published.items():
        for length, figure in zip(LENGTHS, row, strict=True):
            found = peak(decoder, shared, RUNTIMES["eager"], 16, batch, length).total / GIB
            assert (found > 40) == (figure is OOM), (batch, length, found)
            if figure is not OOM:
                figures += 1
                assert found == pytest.approx(figure, rel=0.1), (batch, length)
    assert figures == {1: 21, 8: 19}[cards]


def test_a_peak_is_the_sum_that_the_page_tells() -> None:
    decoder = Decoder(hidden=64, inner=160, heads=4, cached=64, latent=0, vocab=512, context=512)
    weights = Weights(1000, (200, 300), 500)
    one = peak(decoder, share_out(weights, 1), RUNTIMES["eager"], 16, 3, 32)
    tokens = 3 * 32
    attention = tokens * 2 * 64 + 14 * 4 * tokens * 32
    assert attention < 10 * tokens * 512
    fixed = RUNTIMES["eager"].fixed
    assert one == Peak(2000, 2 * 64 * 2 * tokens, 10 * tokens * 512 + 8 * 64 * tokens, fixed)
    fused = peak(decoder, share_out(weights, 1), RUNTIMES["llama.cpp"], 8.5, 3, 512)
    assert fused.cache == 2 * 64 * 3 * 512 * 8.5 / 8
    assert fused.moment == 512 * (4 * 512 + 20 * 64) + 2 * 512 * 512  # of 1536 tokens 512 run at once


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embedding", [False, True])
def test_cards_share_whole_parts_as_evenly_as_can_be(tied: bool, embedding: bool) -> None:
    """Against every way to cut a small model into runs."""
    weights = Weights(70, (30, 10, 20, 40, 10, 30), 0 if tied else 50, beside=5, tied=tied)
    for cards in range(1, 9):
        head = (0 if tied else 50) + (70 if tied and (cards > 1 or not embedding) else 0)
        parts = [75 if embedding else 5, *weights.blocks, head]
        cuts = itertools.combinations(range(1, len(parts)), cards - 1)
        fairest = min(
            max(sum(parts[a:b]) for a, b in itertools.pairwise((0, *cut, len(parts)))) for cut in cuts
        )
        found = share_out(weights, cards, embedding)
        assert max(card.weights for card in found) == fairest
        assert sum(card.weights for card in found) == sum(parts)
        assert sum(card.blocks for card in found) == 6
        assert [card.head for card in found] == [False] * (len(found) - 1) + [True]
        assert len(found) <= cards
    with pytest.raises(UsageError, match="9 cards"):
        share_out(weights, 9)


def test_the_longest_length_fits_and_the_next_does_not() -> None:
    decoder, weights = in_16_bits(CONFIG_7B)
    for name in ("eager", "transformers", "exllamav2", "llama.cpp"):
        runtime = RUNTIMES[name]
        cards = share_out(weights, 1, runtime.embedding)
        found = longest(decoder, cards, runtime, 16, 4, 18 * GIB)
        assert 0 < found < 4096
        assert peak(decoder, cards, runtime, 16, 4, found).total <= 18 * GIB
        assert peak(decoder, cards, runtime, 16, 4, found + 1).total > 18 * GIB
    assert longest(decoder, share_out(weights, 1), RUNTIMES["eager"], 16, 1, 12 * GIB) == 0
    assert longest(decoder, share_out(weights, 1), RUNTIMES["eager"], 16, 1, 400 * GIB) == 4096


def test_latent_attention_is_cached_as_a_runtime_keeps_it() -> None:
    """DeepSeek-V2-Lite's numbers: 512 + 64 values a token and layer in llama.cpp, all heads' elsewhere."""
    decoder, weights = in_16_bits(CONFIG_V2_LITE)
    assert (decoder.latent, decoder.cached) == (576, 16 * (192 + 128))
    assert decoder.inner == 10944
    assert weights.total == 2 * 15_706_484_224  # as the published checkpoint has them
    for name, values in (("llama.cpp", 576), ("transformers", 5120)):
        cards = share_out(weights, 1, RUNTIMES[name].embedding)
        assert peak(decoder, cards, RUNTIMES[name], 16, 2, 100).cache == 2 * 27 * values * 200


def test_the_key_of_an_indexer_is_cached_besides() -> None:
    """DeepSeek-V3.2's numbers, which are its class's defaults."""
    decoder, weights = in_16_bits({"architectures": ["DeepseekV32ForCausalLM"], "num_experts_per_tok": 8})
    cards = share_out(weights, 1, RUNTIMES["llama.cpp"].embedding)
    assert peak(decoder, cards, RUNTIMES["llama.cpp"], 16, 1, 100).cache == 2 * 61 * (576 + 128) * 100
