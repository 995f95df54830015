"""Without the libraries of an extra: what works, and what says in one sentence what to install."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import tiny_checkpoint

from dsconvert.cli import cli
from dsconvert.errors import MissingLibrary
from dsconvert.libraries import EXTRAS, TORCH, lacking, need, of_import

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pickled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that torch has saved."""
    return tiny_checkpoint(tmp_path_factory.mktemp("pickled"), format="bin")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder, in a process that finds no library of an extra."""
    for names in EXTRAS.values():
        for name in names:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(cli, words)
    return done.exit_code, done.stderr


def test_every_extra_is_one_of_the_package() -> None:
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for extra, names in EXTRAS.items():
        carried = [re.split(r"[<>=\[]", each)[0] for each in stated["optional-dependencies"][extra]]
        assert carried == list(names)
        assert not [each for each in stated["dependencies"] if re.split(r"[<>=\[]", each)[0] in names]


def test_a_library_that_is_missing_is_named_with_what_needs_it(plain: Path) -> None:
    assert lacking("click", "torch", "pyarrow") == ["torch", "pyarrow"]
    need("click", what="all")
    with pytest.raises(MissingLibrary) as caught:
        need(*TORCH, what="dancing", instead="sing")
    assert str(caught.value) == (
        "dancing needs torch, which is not installed. Run `pip install torch transformers`, or install "
        "dsconvert with its extra [verify]; or sing."
    )


def test_only_an_import_of_an_extra_is_explained() -> None:
    known = of_import(ModuleNotFoundError("no", name="transformers.models.llama"))
    assert known is not None
    assert str(known).startswith("this needs transformers, which is not installed. Run `pip install torch")
    assert of_import(ModuleNotFoundError("no", name="click.other")) is None
    assert of_import(ModuleNotFoundError("no")) is None


def test_the_sample_is_converted_proven_and_compared(plain: Path) -> None:
    for words in (
        ("gguf", "sample:", "-q", "q4_0,q8_0"),
        ("verify", "sample-q4_0.gguf", "--against", "sample:", "--report", "r.html"),
        ("compare", "sample-q4_0.gguf", "sample-q8_0.gguf", "--against", "sample:"),
    ):
        code, errors = said(*words)
        assert code == 0, errors


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (("gguf", "sample:", "--calib", "builtin"), "calibration needs torch"),
        (("imatrix", "sample:", "--calib", "builtin"), "calibration needs torch"),
        (("gptq", "sample:", "--calib", "builtin"), "calibration needs torch"),
        (("exl2", "sample:", "--calib", "builtin"), "calibration needs torch"),
        (("gguf", "sample:", "--effort", "full", "--device", "cpu"), "the proof of this model"),
        (("gguf", "sample-vl:"), "the proof of the projector needs torch"),
        (("gguf", "PICKLED"), "this needs torch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_needs_more_stops_before_its_work(
    words: tuple[str, ...], needed: str, pickled: Path, plain: Path
) -> None:
    code, errors = said(*(str(pickled) if word == "PICKLED" else word for word in words))
    assert code == 2
    assert needed in errors
    assert "which is not installed. Run `pip install torch transformers`" in errors
    assert not list(plain.iterdir())


def test_a_model_that_numpy_does_not_run_is_refused_or_converted_unproven(plain: Path) -> None:
    folder = tiny_checkpoint(plain / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"logits_scaling_factor": 1.0}), encoding="utf-8")
    code, errors = said("gguf", str(folder), "-q", "f16", "-o", "out.gguf")
    assert code == 2
    assert "the proof of this model" in errors
    assert "; or convert with --effort off, which leaves the proof out." in errors
    assert not (plain / "out.gguf").exists()
    code, errors = said("gguf", str(folder), "-q", "f16", "-o", "out.gguf", "--effort", "off")
    assert code == 0, errors
    code, errors = said("verify", "out.gguf", "--against", str(folder))
    assert code == 2
    assert "needs t" in errors


@pytest.mark.parametrize("option", [("--device", "cpu"), ("--dtype", "float32"), ("--engine", "llama.cpp")])
def test_a_proof_that_asks_for_torch_or_a_runtime_names_what_is_missing(
    option: tuple[str, str], plain: Path
) -> None:
    assert said("gguf", "sample:", "-o", "out.gguf")[0] == 0
    code, errors = said("verify", "out.gguf", "--against", "sample:", *option)
    assert code == 2
    assert "which is not installed. Run `pip install " in errors
