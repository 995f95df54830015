"""Runs that solve experts, in every format: killed at random moments, and by several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibrated
import pytest
import rank_worker
import tiny_experts
from several import processes

from dsconvert.quantization.run_state import state_folder

pytest.importorskip("torch")
pytestmark = pytest.mark.slow
SMALL = ("--calib", "builtin", "--calib-samples", "4", "--calib-len", "128", "--verify", "off")
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq": ("gptq", {"group_size": 32}),
    "w4a16": ("compressed", {"scheme": "w4a16", "group_size": 32}),
    "nvfp4a16": ("compressed", {"scheme": "nvfp4a16", "fed": True}),
    "gguf": ("gguf", {}),
}
WORDS = {
    "gptq": ("gptq", "--group-size", "32"),
    "w4a16": ("compressed", "--scheme", "w4a16", "--group-size", "32"),
    "nvfp4a16": ("compressed", "--scheme", "nvfp4a16"),
    "gguf": ("gguf", "--solver", "gptq", "--quant", "q4_k_m"),
}


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """V3 of a dense layer and one of experts."""
    return tiny_experts.checkpoint(tmp_path_factory.mktemp("experts") / "v3", "v3", **tiny_experts.SMALL_V3)


@pytest.mark.parametrize("kind", KINDS)
def test_kill_at_random_moments_and_resume(kind: str, v3: Path, tmp_path: Path) -> None:
    converter, asked = KINDS[kind]
    assert calibrated.killed_and_resumed(converter, v3, tmp_path, 8, **asked) >= 1


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral"])
def test_other_layouts_of_experts_are_resumed_too(name: str, tmp_path: Path) -> None:
    model = tiny_experts.checkpoint(tmp_path / "model", name)
    assert calibrated.killed_and_resumed("gptq", model, tmp_path, 4, group_size=32) >= 1


@pytest.mark.parametrize("kind", WORDS)
def test_after_a_death_two_processes_go_on_to_the_same_bytes(kind: str, v3: Path, tmp_path: Path) -> None:
    """The second process dies where the layer of experts is to be solved."""
    converter, *more = WORDS[kind]
    ending = ".gguf" if converter == "gguf" else ""
    whole, out = tmp_path / f"whole{ending}", tmp_path / f"out{ending}"
    words = [converter, v3, *SMALL, *more]
    first, second = processes("-m", "dsconvert", *words, "--out", whole)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "2 processes" in first.err
    assert second.out == ""
    died = processes(Path(rank_worker.__file__), "dies", 1, 1, *words, "--out", out)
    assert [done.code for done in died] == [2, 9], died
    assert state_folder(out).exists()
    resumed = processes("-m", "dsconvert", *words, "--out", out, "--resume")
    assert [done.code for done in resumed] == [0, 0], resumed
    assert "going on: 1 of 2 blocks are finished" in resumed[0].err
    assert list(calibrated.digests(out).values()) == list(calibrated.digests(whole).values())
    assert not state_folder(out).exists()
