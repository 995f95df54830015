"""What is printed: nothing that a terminal obeys, whatever a file holds; and work outlives its listeners."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_tokenizer
from click.testing import CliRunner

from dsconvert import console, streams
from dsconvert.cli import cli
from dsconvert.commands import run
from dsconvert.commands.display import Display
from dsconvert.errors import CheckpointError
from dsconvert.texts.hub_files import host

# Escape sequences, a bell, a line that overwrites itself, C1 controls, marks that reorder text, line ends.
EVIL = "\x1b]0;title\x07\x1b[2J\r\x9b31m\x7f\u202eevil\u2066\u200b\u2028\n[bold red]x[/]"
SEEN = r"\x1b]0;title\x07\x1b[2J\r\x9b31m\x7f\u202eevil\u2066\u200b\u2028\n[bold red]x[/]"


def clean(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_everything_said_is_escaped_once(capsys: pytest.CaptureFixture[str]) -> None:
    console.say(EVIL)
    console.note(EVIL)
    console.fail(CheckpointError(EVIL, where=EVIL, why=EVIL))
    console.table([(EVIL, 1), ("b", 22)], ("na\x1bme", "n"), frozenset({1}))
    console.show_mapping({EVIL: EVIL, "list": [EVIL]})
    out, err = capsys.readouterr()
    assert out.startswith(SEEN + "\n")
    assert clean(out + err)
    assert len(out.splitlines()) == 6
    rows = out.splitlines()[2:4]
    assert len(rows[0]) == len(rows[1])  # set by what is shown, not by what is hidden


def test_text_that_can_be_seen_is_left_as_it_is() -> None:
    for text in ("naïve 你好 модель \U0001f600 ▁the Ġthe", r"C:\new\x1b", ""):
        assert streams.escaped(text) == text


def test_json_says_the_same_in_its_own_escapes() -> None:
    value = {EVIL: [EVIL, "你好", "\ud800", "\U000e0001"]}
    text = streams.as_json(value)
    assert text.isprintable()
    assert json.loads(text) == value


def test_a_traceback_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ValueError(EVIL)
    except ValueError as error:
        console.show_traceback(type(error), error, error.__traceback__)
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert clean(err)


@pytest.fixture(scope="module")
def evil_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every name and text holds EVIL."""
    folder = tiny.tiny_checkpoint(tmp_path_factory.mktemp("evil") / "model")
    raw = tiny_tokenizer.tokenizer_json()
    raw["normalizer"] = {"type": "Lowercase" + EVIL}
    tiny_tokenizer.write(folder, raw, {"chat_template": "{{ raise_exception('" + EVIL + "') }}"})
    return folder


@pytest.fixture(scope="module")
def evil_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file whose every name and text holds EVIL."""
    from gguf import GGUFWriter

    path = tmp_path_factory.mktemp("evil") / f"{EVIL.replace('/', '')}.gguf"
    writer = GGUFWriter(path, "llama")
    spec = "dsconvert.pre_tokenizer."
    for key in (EVIL, "dsconvert.pairing_id", "tokenizer.ggml.pre", spec + "flavor", spec + "sha256"):
        writer.add_string(key, EVIL)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    for key in ("tokenizer.ggml.tokens", spec + "type", spec + "regex", spec + "behavior"):
        writer.add_array(key, [EVIL])
    writer.add_array(spec + "invert", [False])
    writer.add_tensor(EVIL[:20], np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "--tensors"],
        ["inspect", "--json"],
        ["tokenizer"],
        ["gguf", "--imatrix"],
        ["imatrix"],
        ["gptq", "--calib"],
        ["verify"],
    ],
    ids=" ".join,
)
def test_no_command_says_anything_that_a_terminal_obeys(
    command: list[str], evil_gguf: Path, evil_folder: Path, tmp_path: Path
) -> None:
    extra = [str(evil_folder), "-o", str(tmp_path / "o")] if command[0] in ("gguf", "gptq") else []
    done = CliRunner().invoke(cli, [*command, str(evil_gguf), *extra])
    assert done.output
    assert clean(done.output), repr(done.output)


@pytest.mark.parametrize("quiet", [[], ["--json"]], ids=["plain", "json"])
def test_what_a_conversion_says_of_a_strangers_model_is_escaped(
    quiet: list[str], evil_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / f"model{EVIL.replace('/', '')}"
    folder.symlink_to(evil_folder)
    done = CliRunner().invoke(cli, ["gguf", str(folder), "-o", str(tmp_path / "x.gguf"), *quiet])
    assert "evil" in done.output
    assert clean(done.output), repr(done.output)


def convert(model: Path, out: Path, streams: str) -> subprocess.CompletedProcess[str]:
    command = f"{sys.executable} -m dsconvert gguf {model} -o {out} --quant f32 --effort off {streams}"
    return subprocess.run(["bash", "-c", command], check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        (">&-", "standard output cannot be written (it is closed)"),
        ("2>&-", ""),
        (">&- 2>&-", ""),
        ("<&- >&- 2>&-", ""),
        (">/dev/full", "standard output cannot be written (No space left on device)"),
        ("2>/dev/full", ""),
        (">/dev/full 2>&1", ""),
        ("2> >(:) > >(:)", ""),
        (" | true; exit ${PIPESTATUS[0]}", ""),
    ],
)
def test_a_conversion_outlives_its_listeners(
    streams: str, said: str, tmp_path: Path, plain_bytes: bytes, plain_model: Path
) -> None:
    done = convert(plain_model, tmp_path / "model.gguf", streams)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "model.gguf").read_bytes() == plain_bytes
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture(scope="module")
def plain_bytes(plain_model: Path) -> bytes:
    out = plain_model.with_name("model.gguf")
    done = convert(plain_model, out, "")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    return out.read_bytes()


class Panic(BaseException):
    """What a library of Rust raises when it panics."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (Panic("the regex ran away"), "unexpected Panic: the regex ran away"),
        (MemoryError(), "there is not enough memory"),
        (OSError(5, "Input/output error"), "unexpected OSError"),
    ],
    ids=["a panic", "memory", "anything else"],
)
def test_whatever_is_left_is_one_paragraph(
    error: BaseException, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        run.run(work, Display(), debug=False)
    assert left.value.code == console.STOPPED
    assert said in capsys.readouterr().err


def test_leaving_is_left_alone() -> None:
    def work() -> int:
        raise SystemExit(7)

    with pytest.raises(SystemExit) as left:
        run.run(work, Display(), debug=False)
    assert left.value.code == 7


@pytest.mark.parametrize("pattern", [r"(a+)+$", r"(x+x+)+y"])
@pytest.mark.parametrize("more", [["--encode"], ["--compare"]])
def test_a_pattern_that_runs_away_gives_the_ordinary_error(
    pattern: str, more: list[str], tmp_path: Path
) -> None:
    raw = tiny_tokenizer.tokenizer_json()
    raw["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    folder = tiny_tokenizer.write(tmp_path / "model", raw)
    (tmp_path / "lines").write_text("a" * 60 + "!\n" + "x" * 60 + "\n")
    given = (
        ["a" * 60 + "!" + "x" * 60]
        if more == ["--encode"]
        else [str(folder), "--text", str(tmp_path / "lines"), "--strings", "0"]
    )
    done = CliRunner().invoke(cli, ["tokenizer", str(folder), *more, *given])
    assert done.exit_code in (0, 2), done.output
    assert "Traceback" not in done.output
    assert done.exit_code == 0 or "cannot encode a text" in done.output


def test_text_that_is_no_utf8_is_refused(tmp_path: Path) -> None:
    folder = tiny_tokenizer.write(tmp_path, tiny_tokenizer.tokenizer_json())
    done = CliRunner().invoke(cli, ["tokenizer", str(folder), "--encode", "caf\udce9"])
    assert done.exit_code == 2
    assert "--encode needs text in UTF-8" in done.output


def test_a_mirrors_password_is_not_shown() -> None:
    assert host("https://user:secret@mirror.example:8443/x/y?token=t") == "mirror.example:8443"
    assert host("https://us@er:se@cret@[::1]:80/") == "[::1]:80"
    assert host("https://huggingface.co/a/b") == "huggingface.co"


def test_python_m_takes_no_module_from_the_current_folder(tmp_path: Path) -> None:
    for name in ("click", "numpy", "yaml", "json", "jinja2"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py of a stranger ran')")
    env = {"PYTHONPATH": str(Path(__file__).parents[1]), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "dsconvert", "inspect", "x.gguf"],
        check=False, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "stranger" not in done.stderr
    assert done.returncode == 2
