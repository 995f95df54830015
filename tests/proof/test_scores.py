"""Figures from slices of the vocabulary are those of whole logits; rows are those of whole tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
from random_llama import make, tokens

from converters.gguf.as_model import open_model
from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.decoder import torch_decoder
from dsconvert.models.weights import widened
from dsconvert.proof import compare
from dsconvert.proof.figures import token_figures
from dsconvert.proof.row_sums import Matrix, snr
from dsconvert.proof.scores import Scores
from dsconvert.texts import windows

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("vocab", "step"), [(97, 97), (97, 13), (97, 2), (3, 2), (5, 1)])
def test_slices_give_the_figures_of_whole_logits(vocab: int, step: int) -> None:
    generator = torch.Generator().manual_seed(vocab + step)
    base = 4 * torch.randn((40, vocab), generator=generator)
    base[3] *= 40  # one token takes everything
    candidate = base + torch.randn((40, vocab), generator=generator) / 4
    candidate[5] = base[5]
    targets = torch.randint(vocab, (40,), generator=generator)
    scores = Scores(targets, vocab)
    for first in range(0, vocab, step):
        for rows in (slice(0, 7), slice(7, 40)):
            part = base[rows, first : first + step], candidate[rows, first : first + step]
            scores.add(rows, first, *part)
    whole, found = token_figures(base, candidate, targets), scores.columns()
    for name in ("nll", "nll_base", "kld"):
        assert found[name] == pytest.approx(whole[name], rel=1e-9, abs=1e-12), name
    for name in ("top", "top_base", "overlap"):
        assert np.array_equal(found[name], whole[name]), name
    assert found["kld"][5] == 0.0
    assert found["overlap"][5] == 1.0


def test_the_first_of_equal_logits_is_the_top_token() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0]])
    scores = Scores(torch.tensor([0]), 5)
    for first in range(5):
        part = logits[:, first : first + 1]
        scores.add(slice(0, 1), first, part, part)
    assert scores.columns()["top"].tolist() == [1]


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}])
def test_small_slices_change_no_figure(keys: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    _, source, config = make(**keys)
    other = source.changed(
        model__embed_tokens__weight=source.tensors["model.embed_tokens.weight"] * np.float32(1.01)
    )
    text = windows.strided(tokens(config, 1, 100)[0], 32, 16)
    whole = compare.result(compare.compare(source, other, config, text, device="cpu"))
    monkeypatch.setattr(torch_decoder, "ROWS_AT_ONCE", 64 * 10)
    monkeypatch.setattr(torch_decoder, "LOGITS_AT_ONCE", 10 * 7)
    sliced = compare.result(compare.compare(source, other, config, text, device="cpu"))
    assert whole.figures is not None
    assert sliced.figures is not None
    assert sliced.figures.tokens == text.scored
    assert sliced.figures.kld.value == pytest.approx(whole.figures.kld.value, rel=1e-5)
    assert sliced.figures.ppl.value == pytest.approx(whole.figures.ppl.value, rel=1e-6)
    for a, b in zip(sliced.tensors, whole.tensors, strict=True):
        assert (a.name, a.type, a.shape) == (b.name, b.type, b.shape)
        assert a.snr == pytest.approx(b.snr, rel=1e-6)


def test_noise_in_parts() -> None:
    base = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    other = base + 0.1 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    other[:100] = base[:100]
    sums = Matrix()
    for start in range(0, 1000, 100):
        sums.add(base[start : start + 100], other[start : start + 100])
    assert sums.decibel == pytest.approx(snr(base, other), abs=1e-6)


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    tiny.tiny_checkpoint(tmp_path, layers=1, d=256, ff=512, heads=4, kv_heads=2)
    for quant in ("f32", "bf16", "q8_0", "q6_k", "q4_0"):
        out = tmp_path / f"{quant}.gguf"
        for _ in convert(Options(str(tmp_path), (quant,), out, pure=True, effort="off")):
            pass
        for source in (open_checkpoint(tmp_path), open_model(open_gguf(out))):
            for name, shape in source.shapes().items():
                if len(shape) == 2:
                    rows = widened(source.rows(name, 3, 20))
                    assert rows.dtype == np.float32
                    assert np.array_equal(rows, source.float32(name)[3:20]), (quant, name)
