"""Several processes at one quantization: the same Hessians, a valid folder, resume, an error told once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import rank_worker
import tiny
from click.testing import CliRunner
from several import SECONDS, Done, environment, processes

from converters.exl2 import reader as exl2_reader
from converters.gptq.convert import convert
from converters.gptq.reader import open_model
from dsconvert.cli import cli
from dsconvert.errors import UsageError
from dsconvert.quantization.ranks import Ranks
from dsconvert.quantization.run_state import state_folder

WORKER = Path(rank_worker.__file__)
SMALL = ["--calib", "builtin", "--calib-samples", "5", "--calib-len", "64", "-g", "32", "--verify", "off"]


def gptq(model: object, out: Path, *more: str) -> list[Done]:
    return processes("-m", "dsconvert", "gptq", model, "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("ranks") / "model", layers=3)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes make of the model without a stop, though torch's threads abort them at their end."""
    out = tmp_path_factory.mktemp("whole") / "out"
    first, second = processes(WORKER, "aborts", "gptq", model, "--out", out, *SMALL)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 processes" in first.err
    assert (second.out, second.err) == ("", ""), "only the first one speaks"
    return out


def test_the_hessians_are_those_of_one_process(tmp_path: Path) -> None:
    done = processes(WORKER, "moments", tmp_path / "m.npz")
    assert [d.code for d in done] == [0, 0], done
    expected = rank_worker.moments()
    with np.load(tmp_path / "m.npz") as found:
        assert set(found.files) == expected.keys()
        for name, moment in expected.items():
            np.testing.assert_allclose(found[name], moment, rtol=1e-5, atol=1e-6 * np.abs(moment).max())
        alone = rank_worker.moments(Ranks(0, 1))
        assert all((alone[name] == expected[name]).all() for name in expected)


def test_a_share_of_the_windows_alone_gives_other_hessians() -> None:
    """What the test above would see if the processes did not speak to each other."""
    expected = rank_worker.moments()

    class Deaf(Ranks):
        def mean(self, own: Any, weight: int) -> Any:
            return own, weight

        def _agree(self, error: Exception | None) -> None:
            assert error is None

    found = rank_worker.moments(Deaf(0, 2))
    assert not any(np.allclose(found[name], expected[name], rtol=1e-3) for name in expected)


def test_the_folder_is_valid_and_near_that_of_one_process(tmp_path: Path, model: Path, whole: Path) -> None:
    options: dict[str, Any] = {"calib": "builtin", "calib_samples": 5, "calib_len": 64, "group_size": 32}
    list(convert(calibrated.gptq_options(model, out=tmp_path / "one", effort="off", **options)))
    one, two = open_model(tmp_path / "one"), open_model(whole)
    assert one.shapes() == two.shapes()
    equal = [(one.float32(f"{n}.weight") == two.float32(f"{n}.weight")).mean() for n in one.linears]
    assert np.mean(equal) > 0.98, "sums in another order move a weight here and there to the next level"
    assert not state_folder(whole).exists()


def test_torchrun_and_the_verdict(tmp_path: Path) -> None:
    """The command as the help gives it; the proof passes, and each thing is said once."""
    command = ["-m", "dsconvert", "gptq", "sample:", "--calib", "builtin", "--calib-samples", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *command, "--lm-head",
         "--out", str(tmp_path / "out")],
        env=environment(), capture_output=True, text=True, timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote ") == 1
    assert done.stdout.count("ok    mean KLD") == 1
    assert "FAIL" not in done.stdout + done.stderr
    assert len(open_model(tmp_path / "out").linears) == 15


@pytest.mark.slow
def test_exl2_is_measured_once_and_solved_together(tmp_path: Path) -> None:
    """The folder has the rate asked for, the head too, and the first process alone speaks."""
    model = tiny.tiny_checkpoint(tmp_path / "model", layers=2, d=128, ff=352)
    small = ["--calib", "builtin", "--calib-samples", "5", "--calib-len", "64", "--verify", "off"]
    measurement = tmp_path / "m.json"
    command = ["-m", "dsconvert", "exl2", model, "--out", tmp_path / "two", "--bpw", "5", *small]
    first, second = processes(*command, "--measurement", measurement)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 processes" in first.err
    assert (second.out, second.err) == ("", "")
    done = CliRunner().invoke(
        cli, ["exl2", str(model), "--out", str(tmp_path / "one"), "--bpw", "5", *small,
              "--measurement", str(measurement)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    one, two = exl2_reader.open_model(tmp_path / "one"), exl2_reader.open_model(tmp_path / "two")
    assert exl2_reader.per_weight(one) == exl2_reader.per_weight(two)
    assert {n: linear.settings.groups for n, linear in one.linears.items()} == {
        n: linear.settings.groups for n, linear in two.linears.items()
    }
    near = [
        np.square(one.float32(f"{n}.weight") - two.float32(f"{n}.weight")).sum()
        / np.square(one.float32(f"{n}.weight")).sum()
        for n in one.linears
    ]
    assert max(near) < 0.05, "sums in another order move a weight here and there to the next level"
    assert not state_folder(tmp_path / "two").exists()


@pytest.mark.parametrize("dead", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_after_a_death_nobody_waits_and_resume_gives_the_same_bytes(
    tmp_path: Path, model: Path, whole: Path, dead: int
) -> None:
    """Whichever dies; that the run then goes on is tried for one of them."""
    out = tmp_path / "out"
    done = processes(WORKER, "dies", dead, 1, "gptq", model, "--out", out, *SMALL)
    assert done[dead].code == 9
    assert done[1 - dead].code == 2, done
    said = [d.err for d in done]
    assert [text.count("error:") for text in said] == [dead, 0]
    assert dead == 0 or "another process of this run has ended" in said[0]
    assert not out.exists()
    assert state_folder(out).exists()
    if dead == 0:
        return
    first, second = gptq(model, out, "--resume")
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "going on: 1 of 3 blocks are finished" in first.err
    assert calibrated.digests(out) == calibrated.digests(whole)


def test_an_error_on_any_process_is_told_once(tmp_path: Path) -> None:
    """k is solved by the second process; the first tells that its weights are no numbers."""
    broken = tiny.tiny_checkpoint(tmp_path / "broken", dtype="f32", format="bin")
    tensors = tiny.tiny_tensors(tiny.Tiny(dtype="f32"))
    tensors["model.layers.0.self_attn.k_proj.weight"][2, 3] = np.nan
    tiny.write_bin(broken / "pytorch_model.bin", tensors)
    first, second = gptq(broken, tmp_path / "out")
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("error:") == 1
    assert "layers.0.self_attn.k_proj.weight: has weights that are no" in first.err
    assert "Traceback" not in first.err + second.err
    assert "error:" not in second.err
    assert not (tmp_path / "out").exists()
    assert not state_folder(tmp_path / "out").exists()


@pytest.mark.slow
def test_what_the_first_process_does_alone_may_fail_too(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("", "utf-8")
    first, second = gptq(model, tmp_path / "out", "--calib", str(text))
    assert (first.code, second.code) == (2, 2)
    assert first.err.count("error:") == 1
    assert "holds no text" in first.err
    assert second.err == ""


def test_shares_and_devices() -> None:
    parts = [Ranks(rank, 3).share(8) for rank in range(3)]
    assert [i for part in parts for i in range(8)[part]] == list(range(8))
    assert max(p.stop - p.start for p in parts) - min(p.stop - p.start for p in parts) == 1
    with pytest.raises(UsageError, match=r"2 calibration windows for 3 processes.*--calib-samples 3"):
        Ranks(0, 3).share(2)
    with pytest.raises(UsageError, match="one device for 2 processes"):
        Ranks(1, 2, 1).device("cuda:0")
    assert Ranks(1, 2, 1).device("cpu") == "cpu"
    assert Ranks(1, 2, 1).device("cuda") == "cuda:1"
    assert Ranks().device("cuda:0") == "cuda:0"
    assert {Ranks(0, 3).owner(i) for i in range(3)} == {0, 1, 2}


def test_a_gguf_file_by_several_processes(tmp_path: Path) -> None:
    """The first process writes it and proves it; the others say nothing."""
    model, out = tiny.tiny_checkpoint(tmp_path / "model", layers=2, d=64), tmp_path / "out.gguf"
    words = ["gguf", model, "--out", out, "-q", "q4_0", "--solver", "gptq", *SMALL[:6]]
    first, second = processes("-m", "dsconvert", *words)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 processes" in first.err
    assert second.out == second.err == ""
    assert not state_folder(out).exists()
