"""Four-bit floats by error feedback: the walk by its formula, what it leaves, whole folders, resumed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
import torch
from click.testing import CliRunner
from fed_problems import K, naive_walk, problem

from converters.compressed.convert import convert
from converters.compressed.fed import FED, LEVELS, ORDER, searched, solve
from converters.compressed.floats import E2M1, to_e2m1
from converters.compressed.fused import FUSED
from converters.compressed.reader import open_model
from converters.compressed.rounded import global_scale
from converters.compressed.schemes import SCHEMES
from dsconvert.checkpoints.safetensors_reader import read_safetensors
from dsconvert.cli import cli
from dsconvert.errors import UsageError
from dsconvert.events import Check, Event
from dsconvert.models.config import load_json
from dsconvert.proof.row_faults import fed
from dsconvert.quantization.known_inputs import measured
from dsconvert.quantization.run import LinearSolved
from dsconvert.quantization.static_blocks import Blocks

NAMES = sorted(FED)
TEXT: dict[str, Any] = {"calib": "builtin", "calib_samples": 8, "calib_len": 128, "fed": True}


def run(model: Path | str, out: Path, **more: Any) -> list[Event]:
    return list(convert(calibrated.compressed_options(model, out=out, **{**TEXT, "effort": "off", **more})))


def loss(E: Any, H: torch.Tensor) -> Any:
    """E H E^T of each row."""
    E = torch.from_numpy(np.asarray(E, np.float64))
    return ((E @ H.double()) * E).sum(1)


def given(name: str) -> tuple[torch.Tensor, torch.Tensor, np.float32]:
    W, H = (part.float() for part in problem())
    return W, H, global_scale(float(W.abs().max())) if name == "nvfp4a16" else np.float32(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("by_activity", [True, False])
def test_codes_are_those_of_the_papers_walk(name: str, by_activity: bool) -> None:
    """In float64, on the scales of the type's own rule; no row is worse than rounded to nearest."""
    W, H, by = given(name)
    kind, inputs = FED[name], measured(H.double(), by_activity=by_activity)
    found = solve(W.double(), inputs, kind, by, search=False)
    assert inputs.factor is not None
    scales = kind.plain(W.numpy(), by)
    d = torch.from_numpy(kind.values(scales, by).T.copy()).double()
    blocks = Blocks(kind.blocks, torch.zeros(W.T.shape, dtype=torch.uint8), d, d, torch.ones_like(d), d)
    damped = H.double().numpy() + inputs.factor.shift * np.eye(K)
    expected = ORDER[naive_walk(W.double().T.numpy(), damped, inputs.columns.numpy(), blocks).T]
    np.testing.assert_array_equal(E2M1[found.codes], E2M1[expected])
    np.testing.assert_array_equal(found.scales, scales)
    nearest = to_e2m1(W.numpy() / kind.values(scales, by).repeat(kind.width, 1))
    assert (found.codes != nearest).mean() > 0.1
    own = loss(W.numpy() - found.weights(kind, by), H)
    plain = loss(W.numpy() - E2M1[nearest] * kind.values(scales, by).repeat(kind.width, 1), H)
    assert bool((own <= plain).all())
    assert found.loss == pytest.approx(float(own.sum()), rel=1e-4)
    assert found.rtn_loss == pytest.approx(float(plain.sum()), rel=1e-4)
    assert found.loss < 0.7 * found.rtn_loss


@pytest.mark.parametrize("name", NAMES)
def test_scales_near_the_rules_cost_least(name: str) -> None:
    """Against a loop over every group; and the solution on them is better."""
    W, H, by = given(name)
    kind, inputs, rows = FED[name], measured(H), W[:4].numpy()
    cost = np.random.default_rng(0).uniform(0, 3, K).astype(np.float32) ** 3
    plain = kind.plain(rows, by)
    found = searched(rows, plain, kind, by, cost)
    for (n, g), code in np.ndenumerate(found):
        part, weight = (x[g * kind.width : (g + 1) * kind.width] for x in (rows[n], cost))
        tried = {}
        for step in kind.near:
            value = float(kind.values(plain[n, g : g + 1] + np.uint8(step % 256), by)[0])
            q = np.array(LEVELS)[np.abs(part[:, None] / value - np.array(LEVELS)).argmin(1)] * value
            tried[step] = float((weight * (part - q) ** 2).sum())
        assert tried[int(code) - int(plain[n, g])] <= min(tried.values()) * (1 + 1e-4)
    searching, not_searching = (solve(W, inputs, kind, by, search) for search in (True, False))
    assert searching.loss < 1.05 * not_searching.loss  # nearly all of it is up to the walk
    assert searching.rtn_loss == not_searching.rtn_loss


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_fed_is_rounded_to_nearest(name: str) -> None:
    W, _, by = given(name)
    found = solve(W, measured(torch.zeros(K, K)), FED[name], by, search=True)
    assert "was ever active" in str(found.fell_back)
    scales = FED[name].values(FED[name].plain(W.numpy(), by), by).repeat(FED[name].width, 1)
    np.testing.assert_array_equal(found.codes, to_e2m1(W.numpy() / scales))
    same = solve(W, measured(0.5 * torch.eye(K)), FED[name], by, search=False)
    np.testing.assert_array_equal(E2M1[same.codes], E2M1[found.codes])  # independent inputs feed nothing


@pytest.mark.parametrize("name", NAMES)
def test_a_proof_knows_what_was_solved(name: str) -> None:
    """Its codes are not the nearest ones by right, and may lose as much of their weights as GPTQ's."""
    W, H, by = given(name)
    for inputs, by_feedback in ((measured(H), True), (measured(torch.zeros(K, K)), False)):
        Q = solve(W, inputs, FED[name], by, search=True).weights(FED[name], by)
        assert fed(len(W), SCHEMES[name].type, lambda i, Q=Q: (W[i].numpy(), Q[i])) == by_feedback


@pytest.mark.parametrize("name", ["nvfp4a16", pytest.param("mxfp4a16", marks=pytest.mark.slow)])
def test_a_folder_is_closer_than_one_rounded_to_nearest(tmp_path: Path, name: str) -> None:
    """As the proof measures it, on text that it was not solved on; it says what it was solved on."""
    kl = {}
    for solved in (True, False):
        events = run(
            "sample:", tmp_path / str(solved), scheme=name, fed=solved, effort="quick", calib_samples=24
        )
        checks = {event.name: event for event in events if isinstance(event, Check)}
        assert [check.detail for check in checks.values() if not check.passed] == []
        kl[solved] = checks["mean KLD"].value
    assert kl[True] is not None
    assert kl[False] is not None
    assert kl[True] < 0.8 * kl[False]
    ours, plain = (read_safetensors(tmp_path / one / "model.safetensors") for one in ("True", "False"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in plain.items()
    }
    settings = [load_json(tmp_path / one / "config.json")["quantization_config"] for one in ("True", "False")]
    meta = settings[0].pop("meta")
    assert meta["calibration"]["text"] == "builtin"
    assert settings[0] == {k: v for k, v in settings[1].items() if k != "meta"}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """With one global scale for fused linears, and an event for each that no loss is above nearest's."""
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=2)
    stopped = calibrated.stopper(monkeypatch)
    events = run(model, tmp_path / "whole", scheme=name)
    solved = [event for event in events if isinstance(event, LinearSolved)]
    assert len(solved) == 14
    assert all(event.loss < event.rtn_loss for event in solved)
    stopped(lambda: run(model, tmp_path / "out", scheme=name), tmp_path / "out", 1)
    run(model, tmp_path / "out", scheme=name, resume=True)
    assert calibrated.digests(tmp_path / "out") == calibrated.digests(tmp_path / "whole")
    if name == "nvfp4a16":
        linears = open_model(tmp_path / "out").linears
        for group in FUSED[:2]:
            for index in range(2):
                part = "self_attn" if "q_proj" in group else "mlp"
                members = (linears[f"model.layers.{index}.{part}.{one}"] for one in group)
                assert len({float(one.parts["weight_global_scale"].rows(0, 1)[0]) for one in members}) == 1


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    for words, said in (
        ("--scheme nvfp4a16 --calib builtin --group-size 32", "--group-size has no effect with nvfp4a16"),
        ("--scheme mxfp4a16 --damp 0.1", "--damp has no effect with mxfp4a16, which is rounded to nearest"),
        ("--scheme fp8-block --calib builtin", "--calib has no effect with fp8-block"),
    ):
        done = CliRunner().invoke(cli, ["compressed", "sample:", *words.split()])
        assert done.exit_code == 2
        assert said in " ".join(done.stderr.split())
    with pytest.raises(UsageError, match="fp8-block is not made by error feedback"):
        run("sample:", tmp_path / "out", scheme="fp8-block")
    assert [name for name, row in sorted(SCHEMES.items()) if row.four_bit and not row.bits] == NAMES
