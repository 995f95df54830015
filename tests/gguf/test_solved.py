"""`dsconvert gguf --solver gptq` as a user runs it: closer files of the same types and size, safely made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import calibrated
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from calibrated import Stop, gguf_options, stopper
from click.testing import CliRunner

from converters.gguf.convert import convert
from converters.gguf.importance import REPORT
from converters.gguf.opened import open_file
from converters.gguf.output import Options
from converters.gguf.parse import GGUFFile, open_gguf
from converters.outputs import open_reference
from dsconvert.cli import cli
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import OutputError, QuantizationError
from dsconvert.events import Check, Event, Warn
from dsconvert.proof import compare
from dsconvert.proof.sources import Reference
from dsconvert.proof.text import default_windows
from dsconvert.quantization.budget import Budget
from dsconvert.quantization.run import LinearSolved

TEXT: dict[str, Any] = {"calib": "builtin", "calib_samples": 32, "calib_len": 256}


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return stopper(monkeypatch)


def run(*quants: str, out: Path, model: Path | str = "sample:", **asked: Any) -> list[Event]:
    return list(convert(gguf_options(model, *quants, out=out, **{"effort": "off", **TEXT, **asked})))


def stored(file: GGUFFile) -> dict[str, tuple[str, bytes]]:
    """Type and bytes of every tensor."""
    return {name: (t.qtype.name, t.blocks().tobytes()) for name, t in file.tensors.items()}


def kld(path: Path) -> float:
    """Mean KL divergence over held-out text."""
    reference, opened = open_reference("sample:"), open_file(path)
    tokenizer = reference.tokenizer
    windows = default_windows(tokenizer.encode, reference.config, tokenizer.first_id)
    windows = replace(windows, tokens=windows.tokens[:4], first=windows.first[:4])
    found = compare.result(
        compare.compare(
            reference.source, opened.source, reference.config, windows, candidate_config=opened.config
        )
    )
    assert found.figures is not None, found.broken
    return found.figures.kld.value


def held_out(reference: Reference, tokens: npt.NDArray[np.int64]) -> dict[str, npt.NDArray[np.float64]]:
    """H of every linear and of the head on tokens [n, length], by name."""
    device = st.pick_device("cpu")
    decoder = st.open_decoder(reference.source, reference.config, device, st.pick_dtype(None, device))
    hidden, moments = linear_inputs.embed(decoder, tokens), {}
    for index in range(reference.config.layers):
        for group in block_walk.walk(decoder, st.load_block(decoder, index), hidden):
            moments |= dict.fromkeys(group.names, group.moment.double().numpy())
    norm = st.read(decoder, st.NORM).to(decoder.dtype)
    return moments | {st.HEAD: linear_inputs.measure_head(decoder, hidden, norm).moment.double().numpy()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Event]]:
    """The sample by an importance matrix and by error feedback, and what was said of the second."""
    folder = tmp_path_factory.mktemp("made")
    plain, fed = folder / "plain.gguf", folder / "fed.gguf"
    run("q4_k_m", out=plain, solver="imatrix")
    return plain, fed, run("q4_k_m", out=fed, effort="quick")


def test_a_file_is_closer_with_the_same_types_and_bytes(made: tuple[Path, Path, list[Event]]) -> None:
    plain, fed, said = made
    here, there = (stored(open_gguf(path)) for path in (fed, plain))
    assert {n: (kind, len(data)) for n, (kind, data) in here.items()} == {
        n: (kind, len(data)) for n, (kind, data) in there.items()
    }
    same = {name for name in here if here[name] == there[name]}
    assert same == {n for n, (kind, _) in here.items() if kind == "f32"} | {"token_embd.weight"}
    assert kld(fed) < 0.8 * kld(plain)
    assert all(check.passed for check in said if isinstance(check, Check))
    solved = [event for event in said if isinstance(event, LinearSolved)]
    assert len(solved) == 15
    assert all(0 < event.loss < event.rtn_loss for event in solved)
    assert not any(isinstance(event, Warn) for event in said)


def test_the_file_says_how_it_was_made(made: tuple[Path, Path, list[Event]]) -> None:
    plain, fed, _ = (open_gguf(made[0]).keys, open_gguf(made[1]).keys, None)
    assert "dsconvert.solver" not in plain
    assert fed["dsconvert.solver"] == "gptq"
    assert fed["dsconvert.solver.damp"] == pytest.approx(0.05)
    assert fed["dsconvert.solver.rounds"] == "1 of q2_k, 1 of q3_k, 0 of others"
    assert fed["quantize.imatrix.entries_count"] == plain["quantize.imatrix.entries_count"] + 1
    assert '"fingerprint"' in fed[REPORT]


def test_no_row_is_worse_than_the_importance_matrixs(made: tuple[Path, Path, list[Event]]) -> None:
    """By inputs that another draw gives: each tensor's own loss, the head's too."""
    reference = open_reference("sample:")
    data, config = reference.tokenizer, reference.config
    moments = held_out(reference, default_windows(data.encode, config, data.first_id).tokens[:4])
    plain, fed = (open_file(path).source for path in made[:2])
    for name, H in moments.items():
        W = reference.source.float32(name).astype(np.float64)
        before, after = (((E @ H) * E).sum() for E in (W - s.float32(name) for s in (plain, fed)))
        assert after < 0.85 * before, name


def test_an_embedding_that_serves_as_the_head_is_solved_by_what_the_head_is_given(tmp_path: Path) -> None:
    """Its outputs on other text are closer than those of llama-quantize's, which rounds it plainly."""
    model, plain, fed = tmp_path / "model", tmp_path / "plain.gguf", tmp_path / "fed.gguf"
    tiny.tiny_checkpoint(model, layers=1, d=128, ff=352, tied=True)
    asked: dict[str, Any] = {"calib_samples": 16, "calib_len": 128}
    asked |= {"model": model, "overrides": (("token_embd.weight", "q4_0"),)}
    run("q4_0", out=plain, solver="imatrix", **asked)
    said = run("q4_0", out=fed, effort="quick", **asked)
    assert [event.name for event in said if isinstance(event, LinearSolved)][-1] == st.HEAD
    assert all(check.passed for check in said if isinstance(check, Check))
    reference = open_reference(str(model))
    tokens = np.random.default_rng(3).integers(0, reference.config.vocab_size, (8, 64))
    H, W = held_out(reference, tokens)[st.HEAD], reference.source.float32(st.EMBED)
    errors = [W.astype(np.float64) - open_file(path).source.float32(st.EMBED) for path in (plain, fed)]
    before, after = (((E @ H) * E).sum() for E in errors)
    assert after < 0.85 * before


def test_the_same_command_gives_the_same_bytes_beside_other_types(
    made: tuple[Path, Path, list[Event]], tmp_path: Path
) -> None:
    """Alone and with others in one run, split or whole."""
    run("q4_k_m", "q3_k_s", "iq4_xs", out=tmp_path / "many.gguf")
    assert stored(open_gguf(tmp_path / "many-q4_k_m.gguf")) == stored(open_gguf(made[1]))
    split = tmp_path / "split.gguf"
    run("q3_k_s", out=split, split_max_size=1 << 20)
    parts = sorted(tmp_path.glob("split-*.gguf"))
    assert len(parts) > 1
    assert stored(open_gguf(parts[0])) == stored(open_gguf(tmp_path / "many-q3_k_s.gguf"))


def test_rounds_lower_the_loss_and_are_told(tmp_path: Path) -> None:
    losses = []
    for rounds in (0, 1):
        out = tmp_path / f"{rounds}.gguf"
        said = run("q3_k_s", out=out, rounds=rounds)
        losses.append(sum(event.loss for event in said if isinstance(event, LinearSolved)))
        assert open_gguf(out).keys["dsconvert.solver.rounds"] == str(rounds)
    assert losses[1] < 0.97 * losses[0]


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path, stop: Stop) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=3)
    few: dict[str, Any] = {"model": model, "calib_samples": 4, "calib_len": 64}
    run("q4_0", out=tmp_path / "whole.gguf", **few)
    out = tmp_path / "out.gguf"
    stop(lambda: run("q4_0", out=out, **few), out, 2)
    result = CliRunner().invoke(
        cli, ["gguf", str(model), "-o", str(out), "--solver", "gptq", "--calib", "builtin"]
    )
    assert result.exit_code == 2
    assert "--resume" in result.output
    said = run("q4_0", out=out, resume=True, **few)
    assert any("2 of 3 blocks are finished" in str(event) for event in said)
    assert calibrated.digests(out)["out.gguf"] == calibrated.digests(tmp_path / "whole.gguf")["whole.gguf"]
    assert not list(tmp_path.glob("*.state"))


@pytest.mark.slow
def test_kill_at_random_moments_and_resume(tmp_path: Path) -> None:
    """20 kills are a benchmark's (benchmarks/better_gguf.py --kills)."""
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=4, d=128, ff=352)
    resumed = calibrated.killed_and_resumed("gguf", model, tmp_path, 6)
    assert resumed >= 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--solver", "gptq"], "needs a calibration text"),
        (["--solver", "gptq", "--calib", "builtin", "-q", "q8_0"], "changes nothing"),
        (["--rounds", "1"], "--rounds has no effect"),
        (["--resume"], "--resume has no effect"),
        (["--solver", "gptq", "--calib", "builtin", "--allow-nonfinite"], "contradict"),
    ],
)
def test_options_that_make_no_sense_are_refused(words: list[str], said: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["gguf", "sample:", "-o", str(tmp_path / "x.gguf"), *words])
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "holds NaN or infinite values"), (1e6, r"--tensor-type 'blk\.1\.ffn_up")]
)
def test_weights_that_no_type_holds_are_refused_by_name(value: float, said: str, tmp_path: Path) -> None:
    options, name = tiny.Tiny(dtype="f32"), "model.layers.1.mlp.up_proj.weight"
    model = tiny.tiny_checkpoint(tmp_path / "model", options)
    tensors = tiny.tiny_tensors(options)
    tensors[name][3, 5] = value
    tiny.write_weights(model, {n: tiny.encode(values, "f32") for n, values in tensors.items()}, options)
    with pytest.raises(QuantizationError, match=said) as raised:
        run("q4_0", out=tmp_path / "out.gguf", model=model, calib_samples=2, calib_len=32)
    assert name in str(raised.value)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("words", "length"),
    [([], 512), (["--solver", "gptq"], 2048), (["--solver", "gptq", "--calib-len", "64"], 64)],
)
def test_error_feedback_takes_longer_windows(
    words: list[str], length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Options] = []
    monkeypatch.setattr("converters.gguf.convert.convert", lambda options, *ranks: seen.append(options) or [])
    CliRunner().invoke(cli, ["gguf", "sample:", "--calib", "builtin", *words], catch_exceptions=False)
    assert seen[0].calibration is not None
    assert seen[0].calibration.length == length


def test_few_tokens_are_told(tmp_path: Path) -> None:
    said = run("q4_0", out=tmp_path / "out.gguf", calib_samples=2, calib_len=64)
    assert any("128 calibration tokens are few" in str(event) for event in said if isinstance(event, Warn))


def test_types_by_cost_have_codes_by_error_feedback(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=2, d=128, ff=352)
    whole, out = tmp_path / "whole.gguf", tmp_path / "out.gguf"
    few: dict[str, Any] = {"model": model, "calib_samples": 8, "calib_len": 128}
    run("q4_1", out=whole, **few)
    size = whole.stat().st_size
    said = run(out=out, budget=Budget(size=size), **few)
    file = open_gguf(out)
    assert out.stat().st_size <= size
    assert file.keys["dsconvert.solver"] == "gptq"
    assert file.keys["dsconvert.types.asked"] == f"{size:,} bytes"
    assert len({tensor.qtype.name for tensor in file.tensors.values()}) > 2
    assert all(event.loss <= event.rtn_loss for event in said if isinstance(event, LinearSolved))


def test_room_for_the_state_is_asked_for_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files alone would fit."""
    nbytes = 2_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=nbytes))
    with pytest.raises(OutputError, match="are free"):
        run("q4_k_m", out=tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())
