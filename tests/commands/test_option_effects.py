"""No option is taken and then dropped: each has its effect, or is refused by name with the reason."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from dsconvert.cli import cli
from dsconvert.proof import logprob_file, numpy_compare


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def projector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pair") / "text.gguf"
    made = command("gguf", "sample-vl:", "-q", "q8_0", "-o", out, "--effort", "off")
    assert made.exit_code == 0, made.output
    return out.with_name("mmproj-text.gguf")


@pytest.mark.parametrize(
    "option",
    [
        ("--text", "builtin"),
        ("--windows", 2),
        ("--length", 64),
        ("--stride", 64),
        ("--effort", "quick"),
        ("--device", "cpu"),
        ("--dtype", "float32"),
        ("--max-kld", 0.1),
        ("--max-ppl-ratio", 2),
        ("--min-top1", 0.1),
        ("--engine", "llama.cpp"),
        ("--report", "page.html"),
        ("--kld-base", "base.kld"),
    ],
    ids=lambda option: option[0],
)
def test_a_projector_alone_takes_no_option_on_text(
    option: tuple[Any, ...], projector: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    name, value = option
    target = tmp_path / value if "." in str(value) and name in ("--report", "--kld-base") else value
    result = command("verify", projector, "--against", "sample-vl:", name, target)
    assert result.exit_code == 2, result.output
    assert f"{name} has no effect on a projector alone" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_projector_takes_what_it_honours(projector: Path) -> None:
    pytest.importorskip("torch")
    result = command("verify", projector, "--against", "sample-vl:", "--json", "-", "--quiet")
    assert result.exit_code == 0, result.output
    assert '"check"' in result.stdout


BACKEND = ("exl2", "sample:", "--backend", "exllamav2")
REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "another backend's text": ((*BACKEND, "--calib", "c4"), "takes no --calib"),
    "another backend's windows": ((*BACKEND, "--calib-samples", 8), "takes no --calib-samples"),
    "another backend's seed": ((*BACKEND, "--seed", 1), "takes no --seed"),
    "another backend's damping": ((*BACKEND, "--damp", 0.1), "takes no --damp"),
    "another backend's device": ((*BACKEND, "--device", "cuda"), "takes no --device"),
    "another backend's chat": ((*BACKEND, "--calib-chat", "x.jsonl"), "takes no --calib-chat"),
    "another backend's seed with its own text": (
        (*BACKEND, "--calib", "x.parquet", "--seed", 1),
        "takes no --seed",
    ),
    "two texts": (("gguf", "sample:", "--calib", "c4", "--calib-chat", "x"), "--calib has no effect beside"),
    "two texts of gptq": (
        ("gptq", "sample:", "--calib", "c4", "--calib-chat", "x"),
        "--calib has no effect beside",
    ),
    "two texts of exl2": (
        ("exl2", "sample:", "--calib", "c4", "--calib-chat", "x"),
        "--calib has no effect beside",
    ),
    "two texts of imatrix": (
        ("imatrix", "sample:", "--calib", "c4", "--calib-chat", "x"),
        "--calib has no effect beside",
    ),
    "a seed without a text": (
        ("gguf", "sample:", "--imatrix", "x.gguf", "--seed", 1),
        "--seed has no effect",
    ),
    "a projector's type without one": (
        ("gguf", "sample-vl:", "--no-mmproj", "--mmproj-quant", "f32"),
        "--mmproj-quant has no effect with --no-mmproj",
    ),
    "a device for nothing": (("gguf", "sample:", "--device", "cpu"), "--device has no effect without"),
    "a comparison's seed": (("tokenizer", "x.gguf", "--seed", 2), "--seed has no effect without --compare"),
    "a comparison's strings": (("tokenizer", "x.gguf", "--strings", 2), "--strings has no effect without"),
    "a comparison's text": (("tokenizer", "x.gguf", "--text", "x"), "--lines has no effect without"),
    "an effort that the engine decides": (
        ("verify", "x.gguf", "--against", "sample:", "--engine", "llama.cpp", "--effort", "quick"),
        "--effort has no effect with --engine",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_effect_is_refused(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, said = REFUSED[name]
    result = command(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_base_decides_the_windows(tmp_path: Path) -> None:
    base = tmp_path / "base.kld"
    new = ("verify", "x.gguf", "--against", "sample:", "--kld-base", base)
    assert "--stride has no effect with --kld-base" in command(*new, "--stride", 8).stderr
    tokens = np.arange(16, dtype="<i4").reshape(2, 8)
    rows = np.zeros(2 * 3 * logprob_file.row_bytes(20), np.uint8)
    base.write_bytes(
        logprob_file.HEADER.pack(logprob_file.MAGIC, 8, 20, 2) + tokens.tobytes() + rows.tobytes()
    )
    for option in (("--text", "c4"), ("--windows", 1), ("--length", 64), ("--effort", "quick")):
        assert f"{option[0]} has no effect because" in command(*new, *option).stderr
    for option in (("--windows", 2), ("--windows", 3), ("--length", 8)):  # as it was written
        assert "has no effect" not in command(*new, *option).stderr


def test_threads_and_a_device_reach_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counted(ThreadPoolExecutor):
        def __init__(self, workers: int) -> None:
            asked.append(workers)
            super().__init__(workers)

    monkeypatch.setattr(numpy_compare, "ThreadPoolExecutor", Counted)
    made = command("gguf", "sample:", "-q", "q8_0", "-o", tmp_path / "a.gguf", "--threads", 3)
    assert made.exit_code == 0, made.output
    assert asked == [3]
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        full = ("gguf", "sample:", "-q", "q8_0", "-o", tmp_path / "b.gguf", "--effort", "full")
        result = command(*full, "--threads", 1, "--device", "tpu")
        assert result.exit_code == 2
        assert "'tpu' is unknown" in result.stderr
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
