"""What a run keeps beside its output: a block's bytes are hashed once, when they are written or read."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path

import calibrated
import numpy as np
import pytest

from dsconvert.checkpoints.safetensors_writer import from_array
from dsconvert.errors import OutputError
from dsconvert.quantization import run_state
from dsconvert.quantization.run_state import State

RECORD = {"linears": [{"name": "a", "fell_back": None}]}


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are read to be hashed."""
    found: list[Path] = []
    digest = run_state._digest
    monkeypatch.setattr(run_state, "_digest", lambda path: [found.append(path), digest(path)][1])
    return found


def test_a_block_is_hashed_as_it_is_written(tmp_path: Path, hashed: list[Path]) -> None:
    state = State(tmp_path)
    for index in range(2):
        state.save(index, {"a": from_array(np.arange(999 + index, dtype=np.float32))}, RECORD)
    records = state.records()
    assert not hashed
    files = [tmp_path / f"block-{index:05d}.safetensors" for index in range(2)]
    assert [r["sha256"] for r in records] == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def test_another_process_hashes_a_block_once(tmp_path: Path, hashed: list[Path]) -> None:
    State(tmp_path).save(0, {"a": from_array(np.arange(999, dtype=np.float32))}, RECORD)
    state = State(tmp_path)
    assert state.records() == state.records()
    assert [path.name for path in hashed] == ["block-00000.safetensors"]


def test_tensors_of_a_block_under_way_are_on_the_disk(tmp_path: Path) -> None:
    """And the block is, byte for byte, what it is of tensors in memory."""
    arrays = {"a": np.arange(999, dtype=np.float32), "b": np.arange(7, dtype=np.int16).reshape(7, 1)}
    whole, state = State(tmp_path / "whole"), State(tmp_path / "state")
    for folder in (whole.folder, state.folder):
        folder.mkdir()
    whole.save(0, {name: from_array(array) for name, array in arrays.items()}, RECORD)
    with state.spool(0) as put:
        pieces = {name: put(from_array(array)) for name, array in arrays.items()}
        held = [weakref.ref(array) for array in arrays.values()]
        arrays.clear()
        assert all(ref() is None for ref in held)
        state.save(0, pieces, RECORD)
    assert calibrated.digests(state.folder) == calibrated.digests(whole.folder)


def test_what_a_killed_block_leaves_is_removed_with_the_rest(tmp_path: Path) -> None:
    """Or written over by a run that goes on."""
    state, half = State(tmp_path), tmp_path / "block-00001.pieces"
    half.write_bytes(b"half of it")
    with state.spool(1) as put:
        assert b"".join(put(from_array(np.arange(3, dtype=np.uint8))).chunks()) == bytes([0, 1, 2])
    assert not half.exists()
    half.write_bytes(b"half of it")
    state.forget()
    assert not half.exists()


@pytest.mark.parametrize("changed", ["block-00000.safetensors", "block-00000.json"])
def test_what_changes_after_it_was_written_is_refused(changed: str, tmp_path: Path) -> None:
    state = State(tmp_path)
    state.save(0, {"a": from_array(np.arange(999, dtype=np.float32))}, RECORD)
    digest = state.records()[0]["sha256"]
    data = (tmp_path / changed).read_bytes()
    (tmp_path / changed).write_bytes(
        data.replace(digest.encode(), b"0" * 64) if "json" in changed else data[:-1] + b"!"
    )
    for one in (state, State(tmp_path)):
        with pytest.raises(OutputError, match="is not as it was written"):
            one.records()


def test_a_removal_that_is_killed_leaves_no_record_without_its_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is left of it, the run that begins anew finds whole blocks only, or makes them again."""
    unlink, left = Path.unlink, [0]

    def killed(self: Path, missing_ok: bool = False) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        unlink(self, missing_ok=missing_ok)

    for count in range(7):
        state = State(tmp_path)
        state.begin({"model": "a"})
        for index in range(3):
            state.save(index, {"a": from_array(np.arange(9, dtype=np.float32))}, RECORD)
        left[0] = count
        monkeypatch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            state.forget()
        monkeypatch.setattr(Path, "unlink", unlink)
        again = State(tmp_path)
        first = len(again.records())
        # Killed while it writes a block that a stale record may be of.
        monkeypatch.setattr(run_state, "write_safetensors", half_written)
        with pytest.raises(KeyboardInterrupt):
            again.save(min(first, 2), {"a": from_array(np.zeros(9, np.float32))}, RECORD)
        monkeypatch.undo()
        assert len(State(tmp_path).records()) <= 3


def half_written(path: Path, *rest: object, **more: object) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt
