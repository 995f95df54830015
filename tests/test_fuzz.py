"""The fuzz of `benchmarks/fuzz.py`: 2,000 mutated files find nothing, and what it looks for it finds."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import fuzz  # noqa: E402
import fuzz_inputs  # noqa: E402

from dsconvert.errors import CheckpointError  # noqa: E402


@pytest.mark.parametrize("count", [400, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_files_find_nothing(count: int) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--count", str(count), "--seed", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"{count} inputs, 0 faults" in done.stdout


def nothing(folder: Path, out: Path) -> None:
    (out / "x").write_text("an output")


def ordinary(folder: Path, out: Path) -> None:
    raise CheckpointError("is damaged", where=folder)


def key_error(folder: Path, out: Path) -> None:
    raise KeyError("a bug")


def panic(folder: Path, out: Path) -> None:
    raise BaseException("a library's panic")


def crash(folder: Path, out: Path) -> None:
    os._exit(9)


def hang(folder: Path, out: Path) -> None:
    time.sleep(600)


def compute(folder: Path, out: Path) -> None:
    while True:
        pass


def memory(folder: Path, out: Path) -> None:
    held = bytearray(b"x" * (1200 << 20))
    time.sleep(len(held) and 1)


def outside(folder: Path, out: Path) -> None:
    (folder.parent / "victim").write_text("overwritten")


def beside(folder: Path, out: Path) -> None:
    (folder / "new").write_text("")


def removed(folder: Path, out: Path) -> None:
    (folder.parent / "victim").unlink()


@pytest.mark.parametrize(
    ("opens", "said"),
    [
        (nothing, ""),
        (ordinary, ""),
        (key_error, "KeyError: \"'a bug'\""),
        (panic, "BaseException"),
        (crash, "ended the process with 9"),
        (hang, "took over"),
        (compute, "took over"),
        (memory, "took"),
        (outside, "wrote outside its folder"),
        (beside, "wrote outside its folder"),
        (removed, "wrote outside its folder"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_it_looks_for_it_finds(
    opens: Callable[[Path, Path], None], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = fuzz_inputs.Kind("base", ("file",), fuzz_inputs.binary, opens, ())
    monkeypatch.setattr(fuzz, "KINDS", {"planted": kind})
    monkeypatch.setattr(fuzz, "SPECIAL", 0)
    monkeypatch.setattr(fuzz, "COMMANDS", 0)
    if said == "took over":
        monkeypatch.setattr(fuzz, "SECONDS", 0.2)
        monkeypatch.setattr(fuzz, "ASLEEP", 0.4)
    (tmp_path / "bases" / "base").mkdir(parents=True)
    (tmp_path / "bases" / "base" / "file").write_bytes(bytes(100))
    (tmp_path / "work").mkdir()
    ballast = bytearray(b"x" * (1100 << 20)) if opens in (nothing, key_error) else b""  # forked, not taken
    faults = fuzz.fuzz(2, 0, "", tmp_path / "bases", tmp_path / "work", 1)
    del ballast
    assert set(faults) == ({0, 1} if said else set())
    assert all(said in fault for fault in faults.values()), faults


@pytest.mark.parametrize(
    ("words", "said"),
    [(("--no-such-option",), ""), (("inspect", "{input}/file"), ""), (("--version",), "")],
)
def test_commands_are_looked_at_too(words: tuple[str, ...], said: str, tmp_path: Path) -> None:
    place = fuzz.Place(tmp_path)
    place.input.mkdir()
    (place.input / "file").write_text("nothing")
    kind = fuzz_inputs.Kind("base", ("file",), fuzz_inputs.binary, nothing, words)
    assert fuzz._invoke(kind, tmp_path, place) == said


def test_a_commands_own_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dsconvert import streams
    from dsconvert.commands import inspect

    def broken(*args: object, **options: object) -> None:
        raise KeyError("a bug")

    kind = fuzz_inputs.Kind(
        "base", ("file",), fuzz_inputs.binary, nothing, ("inspect", "{input}/no\x1b.gguf")
    )
    monkeypatch.setattr(streams, "escaped", lambda text: text)
    assert "printed" in fuzz._invoke(kind, tmp_path, fuzz.Place(tmp_path))
    monkeypatch.setattr(inspect.inspect, "callback", broken)
    assert "exit code 1, KeyError" in fuzz._invoke(kind, tmp_path, fuzz.Place(tmp_path))


@pytest.mark.parametrize("name", ["binary", "text", "structured", "template", "card"])
def test_an_input_is_the_same_each_time(name: str) -> None:
    mutate, data = getattr(fuzz_inputs, name), b'{"a": [1, {"b": "text"}], "c": 2.5}'
    made = [mutate(random.Random(f"5:{number}"), data) for number in range(40)]
    assert made == [mutate(random.Random(f"5:{number}"), data) for number in range(40)]
    assert len(set(made)) > 10
