"""Calibrated conversions in tests: options by their commands' names, runs stopped and killed."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.compressed import plan as compressed_plan
from converters.exl2 import plan as exl2_plan
from converters.gguf import output
from converters.gptq import plan as gptq_plan
from converters.mlx import plan as mlx_plan
from dsconvert.calibration.request import CalibrationRequest
from dsconvert.events import Event
from dsconvert.quantization.plan import RunOptions
from dsconvert.quantization.run_state import State, state_folder

TEXT = {
    "calib": "text", "calib_samples": "samples", "calib_len": "length", "seed": "seed", "calib_chat": "chat",
    "calib_column": "column", "offline": "offline",
}  # fmt: skip
RUN = ("add_bos", "out", "resume", "force", "device", "effort")


def _split(model: Path | str, asked: dict[str, Any]) -> tuple[RunOptions, dict[str, Any]]:
    text = {TEXT[name]: value for name, value in asked.items() if name in TEXT}
    run = {name: value for name, value in asked.items() if name in RUN}
    rest = {name: value for name, value in asked.items() if name not in TEXT and name not in RUN}
    return RunOptions(str(model), CalibrationRequest(**text), **run), rest


def gptq_options(model: Path | str, **asked: Any) -> gptq_plan.Options:
    """The options of `dsconvert gptq MODEL`, each by its option's name."""
    run, rest = _split(model, asked)
    return gptq_plan.Options(run, **rest)


def exl2_options(model: Path | str, **asked: Any) -> exl2_plan.Options:
    """The options of `dsconvert exl2 MODEL`, each by its option's name."""
    run, rest = _split(model, asked)
    return exl2_plan.Options(run, **rest)


def compressed_options(model: Path | str, **asked: Any) -> compressed_plan.Options:
    """The options of `dsconvert compressed MODEL`, each by its option's name."""
    run, rest = _split(model, asked)
    return compressed_plan.Options(run, **rest)


def mlx_options(model: Path | str, **asked: Any) -> mlx_plan.Options:
    """The options of `dsconvert mlx MODEL`, each by its option's name; a text in them calibrates."""
    run, rest = _split(model, asked)
    return mlx_plan.Options(run, calibrated="calib" in asked, **rest)


def gguf_options(model: Path | str, *quants: str, **asked: Any) -> output.Options:
    """The options of `dsconvert gguf MODEL --solver gptq`, each by its option's name."""
    run, rest = _split(model, asked)
    return output.Options(
        run.model, quants or ("q4_k_m",), run.out, effort=run.effort, force=run.force, device=run.device,
        add_bos=run.add_bos, calibration=run.calibration, resume=run.resume, **{"solver": "gptq", **rest},
    )  # fmt: skip


def digests(out: Path) -> dict[str, str]:
    """The sha256 of each file of a folder, or of a file."""
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def remove(out: Path) -> None:
    """Remove an output, a folder or a file."""
    if out.is_dir():
        shutil.rmtree(out)
    else:
        out.unlink()


Stop = Callable[[Callable[[], list[Event]], Path, int], None]


def stopper(monkeypatch: pytest.MonkeyPatch) -> Stop:
    """A verb that runs what it is given until so many blocks are saved, and stops it as Ctrl-C does."""
    limit: list[int] = []
    save = State.save

    def ending(self: State, index: int, *rest: Any) -> None:
        if limit and index == limit[0]:
            raise KeyboardInterrupt
        save(self, index, *rest)

    monkeypatch.setattr(State, "save", ending)

    def stopped(run: Callable[[], list[Event]], out: Path, after: int) -> None:
        limit.append(after)
        with pytest.raises(KeyboardInterrupt):
            run()
        limit.clear()
        assert not out.exists()
        assert state_folder(out).exists()

    return stopped


def killed_and_resumed(kind: str, model: Path, folder: Path, kills: int, **asked: Any) -> int:
    """Kill a run of the converter `kind` at random moments until all `kills` are done; how many went on."""
    words = [kind, str(model), str(folder), str(kills), repr(asked)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("attempts.py")), *words],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    killed, resumed = map(int, done.stdout.split())
    assert killed == kills
    return resumed
