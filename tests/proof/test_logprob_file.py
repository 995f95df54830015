"""llama.cpp's file of base log-probabilities: its bytes, its KL, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from defects import noisy
from random_llama import Memory, make, tokens

from dsconvert.errors import CheckpointError, OutputError, UsageError
from dsconvert.proof import compare
from dsconvert.proof import figures as fig
from dsconvert.proof import logprob_file as kb
from dsconvert.texts import windows

torch = pytest.importorskip("torch")

# What the functions of llama.cpp's tools/perplexity, compiled, gave for these: rows of the file, and, for
# other logits against them and target 2, KL, -ln p, -ln p of the base, same top token, difference of p.
BASE = np.array([[0.5, -1.25, 3, -20, 2, -0.125, 1], [1] * 7, [0, -30, -5, -17, 8, 7.5, -8.25]], np.float32)
OTHER = np.array(
    [[0.75, -1, 2.5, -19, 2.25, -0.25, 1.5], [1, 2, 3, 4, 5, 6, 7], [0, -30, -5, -17, 8, 9, -8.25]],
    np.float32,
)
ROWS = (
    "8000803981f983c1ffd7ffbbffff0000ffefffcdffdf0000",
    "000000009513f9bf00000000000000000000000000000000",
    "8000803957cb83c10080000000300000fffffff700000000",
)
FIGURES = (
    (0.08047265655477531, 0.8815250396728516, 0.4968280792236328, 1, -0.19430673122406006),
    (1.511852741241455, 4.457762718200684, 1.945910096168518, 0, -0.13126888871192932),
    (0.27287268373470397, 14.313352584838867, 13.474241256713867, 0, -7.988911079337413e-07),
)


def write(path: Path, source: Memory, config: Any, text: windows.Windows) -> None:
    for _ in kb.write_base(path, source, config, text, device="cpu"):
        pass


def test_rows_are_llama_cpps_bytes() -> None:
    assert [row.tobytes().hex() for row in kb.encode(BASE)] == list(ROWS)


def test_kl_is_llama_cpps() -> None:
    rows = kb.encode(BASE)
    scale, least = rows[:, :8].copy().view("<f4").T[:, :, None]
    stored = torch.tensor(scale * rows[:, 8:22].copy().view("<u2") + least)
    got = fig.token_figures(stored, torch.tensor(OTHER), torch.full((3,), 2), floor=-16.0)
    for i, (kld, nll, nll_base, same, difference) in enumerate(FIGURES):
        assert got["kld"][i] == pytest.approx(kld, abs=1e-6)
        assert got["nll"][i] == pytest.approx(nll, abs=2e-6)
        assert got["nll_base"][i] == pytest.approx(nll_base, abs=1e-6)
        assert (got["top"][i] == got["top_base"][i]) == bool(same)
        assert np.exp(-got["nll"][i]) - np.exp(-got["nll_base"][i]) == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize("length", [33, 64])
def test_a_file_stands_in_for_the_reference(tmp_path: Path, length: int) -> None:
    _, source, config = make()
    text = windows.consecutive(tokens(config, 1, 200)[0], length, bos=3)
    path = tmp_path / "base.bin"
    write(path, source, config, text)
    assert list(tmp_path.iterdir()) == [path]
    base = kb.open_base(path)
    assert base.vocab == config.vocab_size
    assert np.array_equal(base.windows.tokens, text.tokens)
    assert np.array_equal(base.windows.first, text.first)
    sums = np.exp(base.log_probs(1)).sum(1)
    assert sums.shape == (length - 1 - length // 2,)
    assert sums == pytest.approx(1, abs=2e-3)
    candidate = noisy(source, 0.05)
    got = compare.result(kb.compare_base(base, candidate, config, device="cpu"))
    direct = compare.result(compare.compare(source, candidate, config, text, device="cpu"))
    assert got.figures is not None
    assert direct.figures is not None
    assert got.figures.tokens == direct.figures.tokens
    assert got.figures.kld.value == pytest.approx(direct.figures.kld.value, rel=2e-3)
    assert got.figures.ppl.value == pytest.approx(direct.figures.ppl.value, rel=1e-9)
    assert got.figures.ppl_base.value == pytest.approx(direct.figures.ppl_base.value, rel=1e-3)
    assert got.figures.same_top == direct.figures.same_top


def test_a_model_against_its_own_file_is_near_nothing(tmp_path: Path) -> None:
    _, source, config = make()
    text = windows.consecutive(tokens(config, 1, 128)[0], 64)
    write(tmp_path / "b", source, config, text)
    same = compare.result(kb.compare_base(kb.open_base(tmp_path / "b"), source, config, device="cpu"))
    assert same.figures is not None
    assert abs(same.figures.kld.value) < 1e-4  # the file's 16 bits
    assert same.figures.same_top.value == 1.0


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    _, source, config = make()
    path = tmp_path / "b"
    write(path, source, config, windows.consecutive(tokens(config, 1, 64)[0], 32))
    data = path.read_bytes()
    bad = {
        "empty": b"",
        "short": data[:10],
        "magic": b"_logitz_" + data[8:],
        "cut": data[:-1],
        "long": data + b"\0",
        "count": data[:16] + b"\xff\xff\xff\x7f" + data[20:],
        "negative": data[:8] + b"\xff\xff\xff\xff" + data[12:],
    }
    for name, content in bad.items():
        broken = tmp_path / name
        broken.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            kb.open_base(broken)
        assert name in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be read"):
        kb.open_base(tmp_path / "missing")


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    _, source, config = make()
    ids = tokens(config, 1, 64)[0]
    with pytest.raises(UsageError, match="consecutive windows"):
        write(tmp_path / "b", source, config, windows.strided(ids, 32, 16))
    text = windows.consecutive(ids, 32)
    with pytest.raises(OutputError, match="mkdir -p"):
        write(tmp_path / "no" / "b", source, config, text)
    bad = source.tensors["lm_head.weight"] * np.float32(np.inf)
    with pytest.raises(CheckpointError, match="non-finite"):
        write(tmp_path / "b", Memory({**source.tensors, "lm_head.weight": bad}), config, text)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "b", source, config, text)
    other = dataclasses.replace(config, vocab_size=98)
    with pytest.raises(CheckpointError, match="of a model with 97 tokens"):
        compare.result(kb.compare_base(kb.open_base(tmp_path / "b"), source, other, device="cpu"))
