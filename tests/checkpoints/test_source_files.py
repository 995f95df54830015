"""A source that changes while it is read: no output of a mixture, and a word on which file it was."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import pytest
import tiny
from click.testing import CliRunner

from converters.exl2.convert import convert as to_exl2
from converters.gguf.convert import convert as to_gguf
from converters.gguf.output import Options as Gguf
from converters.gptq.convert import convert as to_gptq
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError
from dsconvert.events import Check, Finished

ASKED: dict[str, Any] = {"calib": "builtin", "calib_samples": 2, "calib_len": 64}


def rewrite(path: Path) -> None:
    """Other content of the same length, in place, as a trainer that saves again leaves it."""
    data, status = path.read_bytes(), path.stat()
    with path.open("r+b") as file:
        file.write(data[: len(data) // 2] + bytes(byte ^ 1 for byte in data[len(data) // 2 :]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


def swap(path: Path) -> None:
    """Another file of the same size and time under the name, as a download replaces it."""
    other, status = path.with_name("other"), path.stat()
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES = {"rewritten": rewrite, "swapped": swap, "removed": remove}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "model", d=128, ff=160, layers=1, shards=2)


def events_of(kind: str, model: Path, out: Path, effort: str = "off") -> Any:
    if kind == "gguf":
        return to_gguf(Gguf(str(model), outfile=out, effort=effort))
    if kind == "gptq":
        return to_gptq(calibrated.gptq_options(model, out=out, group_size=32, effort=effort, **ASKED))
    return to_exl2(calibrated.exl2_options(model, out=out, bpw=6.0, effort=effort, **ASKED))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["gguf", "gptq", "exl2"])
@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "tokenizer.json", "config.json"])
def test_a_change_on_the_way_is_named_and_nothing_is_published(
    model: Path, tmp_path: Path, kind: str, change: str, name: str
) -> None:
    out = tmp_path / "out.gguf"
    events = events_of(kind, model, out)
    next(event for event in events if type(event).__name__ == "TensorDone")
    CHANGES[change](model / name)
    with pytest.raises(CheckpointError) as raised:
        list(events)
    assert name in str(raised.value)
    assert not out.exists()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("kind", ["gguf", "gptq", "exl2"])
def test_a_change_during_the_proof_is_told(model: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out.gguf"
    events = events_of(kind, model, out, "quick")
    next(event for event in events if isinstance(event, Finished))
    swap(model / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="changed while it was read"):
        checks = [event for event in events if isinstance(event, Check)]
        assert checks
    assert out.exists()


def test_what_is_none_of_the_models_may_change(model: Path, tmp_path: Path) -> None:
    (model / "optimizer.bin").write_bytes(b"1")
    (model / "notes.txt").write_text("1")
    events = events_of("gguf", model, tmp_path / "out.gguf")
    next(events)
    (model / "optimizer.bin").write_bytes(b"22")
    (model / "notes.txt").write_text("22")
    (model / "model-q8_0.gguf").write_bytes(b"GGUF")
    list(events)
    assert (tmp_path / "out.gguf").exists()


def test_verify_and_imatrix_look_again_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from converters.gguf import importance_file
    from dsconvert.proof import prove

    out = tmp_path / "out.gguf"
    list(events_of("gguf", model, out))

    def after(function: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            found = yield from function(*arguments, **options)
            swap(model / "model-00001-of-00002.safetensors")
            return found

        return changed

    monkeypatch.setattr(prove, "compare_in_numpy", after(prove.compare_in_numpy))
    monkeypatch.setattr(importance_file, "measure_inputs", after(importance_file.measure_inputs))
    asked = ["verify", str(out), "--against", str(model), "--windows", "1", "--length", "64"]
    matrix = tmp_path / "i.gguf"
    small = ["--calib", "builtin", "--calib-samples", "2", "--calib-len", "64"]
    for command in (asked, ["imatrix", str(model), "-o", str(matrix), *small]):
        done = CliRunner().invoke(cli, command)
        assert done.exit_code == 2
        assert "model-00001-of-00002.safetensors: has changed" in done.stderr
    assert not matrix.exists()


CUT = """
import os, sys
from pathlib import Path
from dsconvert.commands.display import Display
from dsconvert.commands.run import run
from dsconvert.console import render
kind, model, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if kind == "gguf":
    from converters.gguf.convert import convert
    from converters.gguf.output import Options
    options = Options(str(model), outfile=out, effort="off", threads=2)
else:
    import calibrated
    from converters.gptq.convert import convert
    text = dict(calib="builtin", calib_samples=2, calib_len=64)
    options = calibrated.gptq_options(model, out=out, group_size=32, **text)

def events():
    for event in convert(options):
        if type(event).__name__ == "TensorDone":
            os.truncate(model / "model.safetensors", 0)
        yield event

run(lambda: render(events(), quiet=True), Display(), debug=False)
"""


@pytest.mark.parametrize("kind", ["gguf", "gptq"])
def test_a_source_cut_short_says_so_and_leaves_no_part(tmp_path: Path, kind: str) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "model", d=256, ff=704, vocab=2048, layers=3)
    command = [sys.executable, "-W", "ignore", "-c", CUT, kind, str(model), str(tmp_path / "out.gguf")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # tests/support too
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 2, done.stderr
    assert "cut short while it was read" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.gguf").exists()
    assert not list(tmp_path.glob("*.part"))


FORKED = """
import os, sys
from pathlib import Path
import numpy as np
from dsconvert.checkpoints import bus_error
from dsconvert.checkpoints.output_files import part_files
folder = Path(sys.argv[1])
(folder / "source").write_bytes(bytes(100_000))
mapped = np.memmap(folder / "source", np.uint8, "r")
bus_error.watch()
with part_files([folder / "a", folder / "b"], [3, 3], force=False) as parts:
    os.truncate(folder / "source", 0)
    if os.fork() == 0:
        mapped.sum()
    status = os.waitstatus_to_exitcode(os.wait()[1])
    assert (status, len(list(folder.glob("*.part")))) == (2, 2), status
    mapped.sum()
"""


def test_a_bus_error_removes_the_parts_of_its_own_process_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("bus error") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_without_a_compiler_python_says_it(tmp_path: Path) -> None:
    script = "import sys; sys.modules['llvmlite'] = None\n" + FORKED.replace("== (2, 2)", "== (-7, 2)")
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == -7, done.stderr
    assert "Bus error" in done.stderr
