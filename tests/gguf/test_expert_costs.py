"""What types of experts and latent attention cost, against plain sums in float64; files of such types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import numpy.typing as npt
import pytest
import tiny_experts

from converters.gguf import costs, kernels
from converters.gguf.budget import Budget
from converters.gguf.convert import convert
from converters.gguf.parse import open_gguf
from converters.gguf.qtypes import QTYPES
from converters.gguf.rounding import dequantize
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.sensitivity import sensitivities
from dsconvert.events import Check, Event, Foretold, Planned, Warn
from dsconvert.models.config import load_config
from dsconvert.proof import compare
from dsconvert.quantization.costs import after_feedback

torch = pytest.importorskip("torch")
Floats = npt.NDArray[np.float64]
IDS = np.random.default_rng(3).integers(20, 1900, (2, 48))
SIZES = {**tiny_experts.SMALL_V3, "hidden_size": 256, "kv_lora_rank": 256}
KINDS = ("q4_0", "q2_k")
ATTENTION = "model.layers.1.self_attn."


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> st.Decoder:
    folder = tiny_experts.checkpoint(tmp_path_factory.mktemp("costs") / "v3", "v3", **SIZES)
    source, config = open_checkpoint(folder), load_config(folder)
    return st.open_decoder(source, config, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def given() -> dict[str, Any]:
    return tiny_experts.given(tiny_experts.random_model("v3", **SIZES), IDS)


def measured(decoder: st.Decoder, *names: str) -> dict[str, dict[str, float]]:
    types = {name: [QTYPES[kind] for kind in KINDS] for name in names}
    return compare.result(costs.measure(decoder, IDS, types, feedback=False)).nats


def left(W: npt.NDArray[Any], kind: str, X: Floats) -> Floats:
    """What rounding leaves of W by the importance of inputs X [tokens, K]."""
    qtype, blocks = QTYPES[kind], np.empty((len(W), QTYPES[kind].nbytes(W.shape[1])), np.uint8)
    importance = np.square(X).mean(0).astype(np.float32)
    kernels.quantize(qtype, np.ascontiguousarray(W, np.float32), blocks, importance)
    found: Floats = W.astype(np.float64) - dequantize(blocks, qtype).astype(np.float64)
    return found


def test_a_stack_costs_what_its_experts_do_each_by_its_own_tokens(
    decoder: st.Decoder, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "LEAST_OUTPUTS", 999)  # all of them
    name = "blk.1.ffn_up_exps.weight"
    found = measured(decoder, name)[name]
    s = compare.result(sensitivities(decoder, IDS))
    hidden, chosen, _ = given["model.layers.1.mlp.experts"][0]
    for kind in KINDS:
        total = 0.0
        for expert, (_, up, _) in enumerate(decoder.experts[1]):
            X = hidden[(chosen == expert).any(-1)].double().numpy()
            if len(X):
                d = X @ left(decoder.source.float32(up), kind, X).T
                total += float((d**2 @ s[up].double().numpy()).sum()) / 2
        assert found[kind] == pytest.approx(total / IDS.size, rel=2e-3)


def test_the_two_parts_of_keys_and_values_cost_what_each_leaves(
    decoder: st.Decoder, given: dict[str, Any]
) -> None:
    """Both by the latent vectors; keys are rounded as the file has them, by the importance of the queries."""
    keys, values = "blk.1.attn_k_b.weight", "blk.1.attn_v_b.weight"
    X = given[f"{ATTENTION}kv_b_proj"][0][0].double().reshape(-1, 256).numpy()
    Q = given[f"{ATTENTION}q_b_proj"][1].double().reshape(IDS.size, 4, 96)[..., :64].numpy()
    W = decoder.source.float32(f"{ATTENTION}kv_b_proj.weight").reshape(4, 128, 256)
    s = compare.result(sensitivities(decoder, IDS))[f"{ATTENTION}kv_b_proj.weight"]
    s = s.double().numpy().reshape(4, 128)
    types = {keys: [QTYPES["q4_0"]], values: [QTYPES[kind] for kind in KINDS]}
    found = compare.result(costs.measure(decoder, IDS, types, feedback=False)).nats
    d = [X @ left(W[h, :64].T, "q4_0", Q[:, h]) for h in range(4)]
    expected = sum(float((d[h] ** 2 @ s[h, :64]).mean()) for h in range(4)) / 2
    assert found[keys]["q4_0"] == pytest.approx(expected, rel=2e-3)
    for kind in KINDS:
        d = [X @ left(W[h, 64:], kind, X).T for h in range(4)]
        expected = sum(float((d[h] ** 2 @ s[h, 64:]).mean()) for h in range(4)) / 2
        assert found[values][kind] == pytest.approx(expected, rel=2e-3)


def test_error_feedback_leaves_the_share_that_it_leaves_of_the_queries_products() -> None:
    """Of one head whose latent values are independent and as large: of the plain sum over its rows."""
    rng = np.random.default_rng(2)
    Q = rng.normal(size=(400, 8)) @ rng.normal(size=(8, 64)) + 0.1 * rng.normal(size=(400, 64))
    W, queries = rng.normal(size=(64, 96)).astype(np.float32), (2 * Q.T @ Q / len(Q)).astype(np.float32)
    moment, H, s = torch.from_numpy(queries), torch.eye(96), torch.ones(64)
    kind, more = [QTYPES["q4_0"]], (H, moment[None], s[None])
    plain, fed = (
        costs.keys_costs(torch.from_numpy(W)[None], *more, kind, on)["q4_0"] for on in (False, True)
    )
    R, L = left(W.T, "q4_0", Q), after_feedback(moment, costs.DAMP)
    assert L is not None
    share = float((R**2 @ L.double().numpy()).sum() / ((R @ queries.astype(np.float64)) * R).sum())
    assert plain == pytest.approx(float((R**2).sum()) / 4, rel=1e-3)
    assert fed == pytest.approx(share * plain, rel=1e-3)
    assert share < 0.7


def made(model: str, out: Path, *quants: str, **more: Any) -> list[Event]:
    text = {"calib": "builtin", "calib_samples": 8, "calib_len": 256}
    return list(
        convert(calibrated.gguf_options(model, *quants, out=out, **{**text, "solver": "imatrix", **more}))
    )


def kl(events: list[Event]) -> float:
    (value,) = [e.value for e in events if isinstance(e, Check) and e.name == "mean KLD"]
    assert isinstance(value, float)
    return value


def test_a_file_of_experts_is_closer_than_the_rule_of_its_size(tmp_path: Path) -> None:
    """On the trained sample, as the proof measures it, the foretold figure beside the measured one."""
    ruled = made("sample-moe:", tmp_path / "ruled.gguf", "q3_k_m")
    size = (tmp_path / "ruled.gguf").stat().st_size
    events = made("sample-moe:", tmp_path / "out.gguf", budget=Budget(size=size))
    assert [e.detail for e in events if isinstance(e, Check) and not e.passed] == []
    assert size - 60_000 < (tmp_path / "out.gguf").stat().st_size <= size
    assert kl(events) < 0.5 * kl(ruled)
    (foretold,) = [event for event in events if isinstance(event, Foretold)]
    assert 0.7 < foretold.measured / foretold.nats < 2
    assert foretold.nats == pytest.approx(
        open_gguf(tmp_path / "out.gguf").keys["dsconvert.types.foretold_kl"]
    )


def test_every_matrix_has_a_type_that_its_rows_fill(tmp_path: Path) -> None:
    """What is not multiplied by on all texts, an indexer, has the usual one; routers and norms none."""
    sizes = {**tiny_experts.SMALL_V3, "hidden_size": 256, "index_n_heads": 4}
    model = tiny_experts.checkpoint(tmp_path / "v32", "v32", **sizes)
    asked = Budget(bpw=5, types=("q3_k", "q4_k", "q5_k", "q6_k"))
    events = made(str(model), tmp_path / "out.gguf", budget=asked, effort="off", calib_len=32)
    (plan,) = [event for event in events if isinstance(event, Planned)]
    for tensor in plan.tensors:
        if "indexer" in tensor.name and "norm" not in tensor.name and "proj" not in tensor.name:
            assert tensor.type == "q8_0"
        elif "norm" in tensor.name or "ffn_gate_inp" in tensor.name or len(tensor.shape) < 2:
            assert tensor.type == "f32"
        elif "proj" not in tensor.name:
            fallen = tensor.shape[-1] % 256 != 0
            assert tensor.type in (("q4_0", "q5_0", "q5_1", "q8_0") if fallen else asked.types), tensor
    said = [event.text for event in events if isinstance(event, Warn)]
    assert any("what types cost of" in text and "matrices of experts" in text for text in said)
