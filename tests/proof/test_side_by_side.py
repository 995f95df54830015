"""Matrices that are compared piece by piece, and read again, give what they give as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from random_llama import Memory, make, plain, tokens

from dsconvert.decoder import experts
from dsconvert.decoder import torch_decoder as st
from dsconvert.proof import compare, output_losses, side_by_side
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
GATE = "model.layers.1.mlp.gate_proj.weight"  # 160 rows


def candidates(source: Memory) -> dict[str, Memory]:
    """Rounded plainly; all of a matrix otherwise; the first rows plainly; and all but one plainly."""
    made = plain(source, "q4_0")
    N, noise = made.tensors[GATE], np.random.default_rng(0).standard_normal((160, 64)).astype(np.float32)
    found = {"plain": N, "otherwise": N + 0.02 * noise, "late": N.copy(), "one": N.copy()}
    found["late"][140:] += 0.1 * noise[140:]
    found["one"][150] *= np.float32(1.3)
    return {name: made.changed(**{GATE.replace(".", "__"): array}) for name, array in found.items()}


@pytest.mark.parametrize("case", ["plain", "otherwise", "late", "one"])
@pytest.mark.parametrize("lone", [False, True])
def test_pieces_say_what_the_whole_says(monkeypatch: pytest.MonkeyPatch, case: str, lone: bool) -> None:
    """Also of an MLP that is read matrix by matrix as it runs."""
    _, source, config = make()
    candidate, text = candidates(source)[case], windows.whole(tokens(config, 2, 64))
    monkeypatch.setattr(experts, "LARGE", 0 if lone else experts.LARGE)
    monkeypatch.setattr(output_losses, "AT_FIRST", 64 * 64)

    def found() -> compare.Comparison:
        return compare.result(compare.compare(source, candidate, config, text, device="cpu"))

    whole = found()
    monkeypatch.setattr(side_by_side, "PIECE", 128 * 64)
    pieces = found()
    assert (pieces.figures, pieces.foretold, pieces.blocks) == (whole.figures, whole.foretold, whole.blocks)
    for one, other in zip(pieces.tensors, whole.tensors, strict=True):
        assert (one.name, one.rows, one.faults, one.fed) == (other.name, other.rows, other.faults, other.fed)
        assert [one.lost is None, one.loss is None] == [other.lost is None, other.loss is None], one.name
        figures = [(error.snr, error.lost or 0.0, error.loss or 0.0) for error in (one, other)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-5), one.name
    (gate,) = (tensor for tensor in pieces.tensors if tensor.name == GATE)
    assert (gate.loss is not None) == (case != "plain")


def test_of_a_large_matrix_of_the_candidate_a_piece_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    _, source, config = make()
    monkeypatch.setattr(side_by_side, "PIECE", 128 * 64)
    place, kind = st.pick_device("cpu"), torch.float32
    pair = tuple(st.open_decoder(s, config, place, kind) for s in (source, plain(source, "q8_0")))
    weights = side_by_side.Weights(pair)
    read, asked = st.read, []

    def seen(decoder: st.Decoder, name: str, rows: slice | None = None) -> Any:
        asked.append(rows)
        return read(decoder, name, rows)

    monkeypatch.setattr(st, "read", seen)
    assert torch.equal(weights.compared(GATE), torch.from_numpy(source.tensors[GATE]))
    assert asked == [rows for rows in (slice(0, 128), slice(128, 160)) for _ in pair]
    assert weights.kept == {}
