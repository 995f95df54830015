"""What types are foretold to cost, against plain sums in float64 and against the KL divergence itself."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import random_llama
import torch

from converters.gguf import costs, kernels
from converters.gguf.qtypes import QTYPES
from converters.gguf.rounding import dequantize
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.sensitivity import sensitivities
from dsconvert.proof import compare
from dsconvert.quantization.costs import after_feedback

CPU = torch.device("cpu")
KINDS = ("q2_k", "q4_k", "q8_0", "q4_0")


Floats = npt.NDArray[np.float32]


def rounded(W: Floats, kind: str, importance: Floats | None) -> npt.NDArray[np.float64]:
    qtype = QTYPES[kind]
    blocks = np.empty((len(W), qtype.nbytes(W.shape[1])), np.uint8)
    kernels.quantize(qtype, W, blocks, importance if kernels.takes_importance(qtype) else None)
    return dequantize(blocks, qtype).astype(np.float64)


def a_linear(n: int = 48, k: int = 256) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(5)
    X = rng.normal(size=(600, 40)) @ rng.normal(size=(40, k)) * np.exp(rng.normal(size=k))
    X += 0.1 * rng.normal(size=X.shape)
    W, s = rng.normal(size=(n, k)), np.exp(rng.normal(size=n))
    W, H, s = (torch.from_numpy(a.astype(np.float32)) for a in (W, 2 * X.T @ X / len(X), s))
    return W, H, s


def test_a_linear_costs_what_the_sum_over_its_outputs_says() -> None:
    W, H, s = a_linear()
    found = costs.linear_costs(W, H, s, [QTYPES[kind] for kind in KINDS])
    importance = (H.diagonal() / 2).numpy()
    for kind in KINDS:
        R = W.double().numpy() - rounded(W.numpy(), kind, importance)
        plain = sum(float(s[n]) * R[n] @ H.double().numpy() @ R[n] for n in range(len(R))) / 4
        assert found[kind] == pytest.approx(plain, rel=1e-3)


def test_after_feedback_it_costs_what_independent_roundings_leave() -> None:
    """By the paper's form: with the damped H = U D U^T, errors R U^-1 of roundings R."""
    W, H, s = a_linear()
    L = after_feedback(H, costs.DAMP)
    assert L is not None
    found = costs.linear_costs(W, H, s, [QTYPES["q4_k"]], L)["q4_k"]
    R = W.double().numpy() - rounded(W.numpy(), "q4_k", (H.diagonal() / 2).numpy())
    order = np.argsort(-H.diagonal().numpy(), kind="stable")
    h = H.double().numpy()[np.ix_(order, order)]
    damped = h + costs.DAMP * np.trace(h) / len(h) * np.eye(len(h))
    lower = np.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper, so that damped = lower lower^T
    U = lower / np.diag(lower)
    inverse = np.linalg.inv(U)
    # E[(r U^-1) H (r U^-1)^T] over roundings r with independent signs and these squares
    weights = np.einsum("ij,jk,ik->i", inverse, h, inverse)
    plain = float((s.double().numpy() @ (R[:, order] ** 2)) @ weights) / 4
    assert found == pytest.approx(plain, rel=2e-3)
    assert found < costs.linear_costs(W, H, s, [QTYPES["q4_k"]])["q4_k"]


def test_inputs_that_are_never_active_cannot_be_fed_back() -> None:
    assert after_feedback(torch.zeros(64, 64), costs.DAMP) is None


@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_pay_for_what_they_are(tied: bool) -> None:
    """Each its own sum; one table that is both pays both, a token looked up as often as it is predicted."""
    _, source, config = random_llama.make(
        hidden_size=256, num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=tied
    )
    decoder = st.open_decoder(source, config, CPU, torch.float32)
    windows = random_llama.tokens(config, 4, 40)
    embed, output = "token_embd.weight", "output.weight"
    kinds = {name: [QTYPES["q4_k"]] for name in ((embed,) if tied else (embed, output))}
    found = compare.result(costs.measure(decoder, windows, kinds, feedback=False))
    s = compare.result(sensitivities(decoder, windows))
    hidden = linear_inputs.embed(decoder, windows)
    for index in range(config.layers):
        block_walk.advance(decoder, st.load_block(decoder, index), hidden)
    H = linear_inputs.measure_head(decoder, hidden, st.read(decoder, st.NORM)).moment.double().numpy()
    counts = np.bincount(windows.ravel(), minlength=config.vocab_size) + 1.0
    at = {st.EMBED: s[st.EMBED].numpy(), st.HEAD: (np.diag(H) / 2).astype(np.float32)}

    def left(name: str, importance: Floats | None) -> npt.NDArray[np.float64]:
        W = source.float32(name)
        result: npt.NDArray[np.float64] = W.astype(np.float64) - rounded(W, "q4_k", importance)
        return result

    frequencies = counts / counts.sum()
    if tied:
        frequencies = (s[st.HEAD] / s[st.HEAD].sum()).numpy()
        at[st.EMBED] = (np.diag(H) / 2 + at[st.EMBED] / s[st.HEAD].sum().numpy()).astype(np.float32)
    R = left(st.EMBED, at[st.EMBED])
    embedding = sum(p * (R[t] ** 2 @ s[st.EMBED].numpy()) for t, p in enumerate(frequencies)) / 2
    R = R if tied else left(st.HEAD, at[st.HEAD])
    head = sum(float(s[st.HEAD][n]) * R[n] @ H @ R[n] for n in range(len(R))) / 4
    if tied:
        assert found.nats == {embed: {"q4_k": pytest.approx(embedding + head, rel=1e-3)}}
        np.testing.assert_allclose(found.importance[embed], at[st.EMBED], rtol=1e-5)
        assert list(found.importance) == [embed]
        fed = compare.result(costs.measure(decoder, windows, kinds, feedback=True)).nats[embed]["q4_k"]
        assert fed < 0.98 * (embedding + head)
    else:
        assert found.nats[embed]["q4_k"] == pytest.approx(embedding, rel=1e-3)
        assert found.nats[output]["q4_k"] == pytest.approx(head, rel=1e-3)
        for gguf, name in ((embed, st.EMBED), (output, st.HEAD)):
            np.testing.assert_allclose(found.importance[gguf], at[name], rtol=1e-5)


def test_a_sample_of_a_large_table_stands_for_all_of_it() -> None:
    counts = np.random.default_rng(0).zipf(1.3, 9 * costs.ROWS).astype(np.int64) % 10_000
    chosen = costs.sampled(counts)
    assert len(set(chosen.rows.tolist())) == len(chosen.rows) == costs.ROWS
    weights = torch.from_numpy((counts + 1) / (counts + 1).sum()).float()
    found = chosen.weights(weights)
    assert float(found.sum()) == pytest.approx(1, rel=1e-4)
    common = chosen.rows[: chosen.common]
    assert counts[common].min() >= np.delete(counts, common).max()
    assert torch.equal(found[: chosen.common], weights[torch.from_numpy(common)])
    small = costs.sampled(counts[:100])
    assert sorted(small.rows.tolist()) == list(range(100))
