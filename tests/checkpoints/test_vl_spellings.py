"""DeepSeek-VL as wrappers and inner classes save it gives the bytes of the plain checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_vl
from tiny_vl import VL

from converters.gguf.convert import convert
from converters.gguf.output import Options
from dsconvert.checkpoints.checkpoint import open_checkpoint


@pytest.fixture(autouse=True)
def tiny_towers(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_vl.tiny_towers(monkeypatch)


def converted(folder: Path) -> tuple[bytes, bytes]:
    """The text file and the projector."""
    out, projector = folder / "out.gguf", folder / "mmproj.gguf"
    asked = Options(str(folder / "model"), outfile=out, mmproj=projector, quants=("q8_0",), effort="off")
    assert list(convert(asked))
    return out.read_bytes(), projector.read_bytes()


def spell(name: str, spelling: str) -> str:
    """A tensor's name as the inner class has it, or with a prefix before it."""
    return name.removeprefix("model.") if spelling == "inner class" else spelling + name


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize(
    ("layout", "spelling"),
    [
        ("transformers", "module."),
        ("transformers", "base_model.model."),
        ("transformers", "inner class"),
        ("transformers4", "inner class"),
        ("transformers4", "_orig_mod."),
        ("original", "module."),
        ("original", "base_model.model."),
    ],
)
def test_every_spelling_gives_the_plain_bytes(
    tmp_path: Path, hybrid: bool, layout: tiny_vl.Layout, spelling: str
) -> None:
    plain, other = tmp_path / "plain", tmp_path / "other"
    for folder in (plain, other):
        tiny_vl.vl_checkpoint(folder / "model", VL(hybrid=hybrid), layout)
    source = open_checkpoint(plain / "model")
    assert not source.notes
    stored = {spell(name, spelling): np.array(source.tensors[name].data) for name in source.shapes()}
    tiny_vl.write_weights(other / "model", stored)
    assert "names are those of a wrapper or an inner class" in open_checkpoint(other / "model").notes[-1]
    assert converted(other) == converted(plain)
