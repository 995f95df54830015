"""`dsconvert chat`, in a pseudo-terminal and with one question: streams, keys, stop tokens, exit codes."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parrot
import pytest
from click.testing import CliRunner, Result
from terminal import CTRL_C, CTRL_D, Terminal

from converters.gguf.convert import convert
from converters.gguf.output import Options
from dsconvert.cli import cli
from dsconvert.commands.chat_terminal import Interrupt, Leave
from dsconvert.streams import write_part

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)
READY = ">>> "
LIKELIEST = ("--temperature", 0, "--threads", 1)
FIGURES = re.compile(
    r"\[prompt (\d+) tokens(?: \((\d+) new\))?, [\d.e+]+ tokens/s; answer (\d+) tokens, [\d.e+]+ tokens/s"
    r"(?:, [\w -]+)?; context (\d+) of (\d+)\]"
)


def command(*arguments: object, **settings: Any) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **settings)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """GGUF files in folders of their own: of the embedded samples, of a model that says one sentence."""
    root = tmp_path_factory.mktemp("chat")
    folders = {"sample": "sample:", "pictures": "sample-vl:"}
    for name, template in (("parrot", parrot.TEMPLATE), ("base", "")):
        folders[name] = str(parrot.parrot(root / name, template))
    for name, folder in folders.items():
        (root / name).mkdir(exist_ok=True)
        list(convert(Options(folder, ("q8_0",), root / name / f"{name}.gguf", effort="off")))
    return {name: root / name / f"{name}.gguf" for name in folders}


def figures(text: str) -> list[int]:
    """The line of figures: tokens of the prompt, new ones, of the answer, context used, context."""
    found = FIGURES.search(text)
    assert found is not None, text
    return [int(number or found[1]) for number in found.groups()]


def answered(terminal: Terminal) -> str:
    """What is shown up to the next prompt, after the line of figures: the sample writes prompts, too."""
    return terminal.expect("]\n" + READY) + "]"


def picture(path: Path, seed: int) -> Path:
    """A PNG of coloured noise."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    pixels = np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8)
    image.fromarray(pixels).save(path)
    return path


def test_a_conversation_in_a_terminal(models: dict[str, Path]) -> None:
    """Answers end at the second token of generation_config's list, and a second turn reads what is new."""
    with Terminal("chat", models["parrot"], *LIKELIEST) as terminal:
        terminal.expect(READY)
        terminal.type("Is it?\n")
        shown = answered(terminal)
        assert f"\n{parrot.ANSWER}\n" in shown
        assert parrot.NEVER not in shown
        prompt, new, answer, used, context = figures(shown)
        assert (prompt, answer, context) == (new, used - prompt, 512)
        terminal.type("And that?\n")
        second, new, *_ = figures(answered(terminal))
        assert second == used + new
        terminal.type("/clear\n")
        terminal.expect("forgotten")
        terminal.expect(READY)
        terminal.type('"""\nIs it?\n"""\n')
        assert figures(answered(terminal))[0] == prompt
        terminal.type("/hello\n")
        terminal.expect("/hello is no command; /help shows")
        terminal.expect(READY)
        terminal.type("/help\n")
        terminal.expect("/image FILE")
        terminal.expect(READY)
        terminal.type("x " * 600 + "\n")
        terminal.expect("error: ")
        terminal.expect("the message does not fit")
        terminal.expect(READY)
        terminal.type(CTRL_D)
        assert terminal.ended() == 0


def test_an_answer_is_interrupted_and_the_conversation_goes_on(models: dict[str, Path]) -> None:
    """At this question the sample finds no end."""
    with Terminal("chat", models["sample"], *LIKELIEST) as terminal:
        terminal.expect(READY)
        terminal.type("Hello, who are you?\n")
        terminal.expect("format")
        terminal.type(CTRL_C)
        shown = answered(terminal)
        assert ", interrupted;" in shown
        *_, used, _ = figures(shown)
        assert used < 1024
        terminal.type("More.\n")
        terminal.expect("More.\n")
        terminal.more()
        terminal.type(CTRL_C)
        prompt, new, *_ = figures(answered(terminal))
        assert prompt > used - 2
        assert new < prompt
        terminal.type(CTRL_C)
        assert terminal.ended() == 0


def test_a_second_ctrl_c_during_an_answer_leaves() -> None:
    interrupt = Interrupt()
    with interrupt.during_answer():
        assert not interrupt.stopped()
        interrupt(signal.SIGINT, None)
        assert interrupt.stopped()
        with pytest.raises(Leave):
            interrupt(signal.SIGINT, None)
    with interrupt.during_answer():
        assert not interrupt.stopped()
    with pytest.raises(Leave):
        interrupt(signal.SIGINT, None)


def test_what_a_terminal_would_obey_is_escaped_there_and_nowhere_else() -> None:
    said = "a\x1b[2J\u4f60\u00a0\u200d\n\tb\x9b\r"
    shown, piped = Tty(), io.StringIO()
    write_part(shown, said)
    write_part(piped, said)
    assert shown.getvalue() == "a\\x1b[2J\u4f60\u00a0\u200d\n\tb\\x9b\\r"
    assert piped.getvalue() == said


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_question_gives_the_answer_alone_on_standard_output(models: dict[str, Path]) -> None:
    result = command("chat", models["parrot"], "--prompt", "Is it?", *LIKELIEST)
    assert (result.exit_code, result.stdout) == (0, parrot.ANSWER + "\n")
    assert figures(result.stderr)[2] == len(parrot_tokens())
    quiet = command("chat", models["parrot"], "--prompt", "Is it?", *LIKELIEST, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (parrot.ANSWER + "\n", "")


def parrot_tokens() -> list[int]:
    from tokenizers import Tokenizer

    found: list[int] = Tokenizer.from_str(parrot.tiny.tokenizer_json(512)).encode(parrot.ANSWER).ids
    return found


def test_an_answer_that_nobody_reads_ends(models: dict[str, Path]) -> None:
    """At this question the sample writes until its context is full."""
    words = ["chat", models["sample"], "--prompt", "Hello, who are you?", *map(str, LIKELIEST)]
    words += ["--context", "8192"]
    with subprocess.Popen(
        [sys.executable, "-m", "dsconvert", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.read(1)
        running.stdout.close()
        said = running.stderr.read()
    assert "standard output cannot be written" in said
    assert ", interrupted;" in said
    assert figures(said)[3] < 8000


def test_standard_input_is_the_question(models: dict[str, Path]) -> None:
    given = command("chat", models["parrot"], *LIKELIEST, "--json", input="Is it?\n")
    asked = command("chat", models["parrot"], *LIKELIEST, "--json", "--prompt", "Is it?")
    assert given.exit_code == asked.exit_code == 0
    answers = [json.loads(result.stdout) for result in (given, asked)]
    assert answers[0]["prompt_tokens"] == answers[1]["prompt_tokens"]
    assert (answers[0]["event"], answers[0]["text"], answers[0]["ended"]) == ("answer", parrot.ANSWER, "stop")
    result = command("chat", models["parrot"], input=b"\xff\xfe")
    assert result.exit_code == 2
    assert "standard input is not UTF-8" in result.stderr
    result = command("chat", "none.gguf", input="")
    assert "there is no such file or folder" in result.stderr


def test_a_model_without_a_template_is_said_to_be_none(models: dict[str, Path]) -> None:
    result = command("chat", models["base"], "--prompt", "the answer:", *LIKELIEST)
    assert (result.exit_code, result.stdout) == (0, parrot.ANSWER + "\n")
    assert "warning: the model has no chat template" in result.stderr
    result = command("chat", models["base"], "--prompt", "x", "--system", "Be brief.")
    assert result.exit_code == 2
    assert "--system has no effect on a model without a chat template" in result.stderr


def test_the_same_seed_gives_the_same_answer(models: dict[str, Path]) -> None:
    ask = (
        "chat",
        models["sample"],
        "--prompt",
        "Hello",
        "--max-tokens",
        12,
        "--threads",
        1,
        "--quiet",
        "--seed",
    )
    first, again, other = (command(*ask, seed).stdout for seed in (3, 3, 4))
    assert first == again != other


def test_a_folder_is_run_in_torch(models: dict[str, Path]) -> None:
    """Its stop tokens are the files' own, all of them."""
    pytest.importorskip("torch", reason="needs torch: pip install torch")
    result = command("chat", models["parrot"].parent, "--prompt", "Is it?", *LIKELIEST)
    assert (result.exit_code, result.stdout) == (0, parrot.ANSWER + "\n")
    assert figures(result.stderr)[2] == len(parrot_tokens())


def test_a_picture_is_part_of_the_prompt(models: dict[str, Path], tmp_path: Path) -> None:
    ask = ("chat", models["pictures"], "--prompt", "What?", "--max-tokens", 3, *LIKELIEST, "--json")
    blind, seeing = (
        json.loads(command(*ask, *more).stdout) for more in ((), ("--image", picture(tmp_path / "a.png", 1)))
    )
    # The text is cut where the picture stands, and has a token more for it.
    assert seeing["prompt_tokens"] == blind["prompt_tokens"] + 576 + 1
    named = ("--mmproj", models["pictures"].with_name("mmproj-pictures.gguf"))
    assert json.loads(command(*ask, *named).stdout)["text"] == blind["text"]


def test_a_picture_in_a_terminal(models: dict[str, Path], tmp_path: Path) -> None:
    with Terminal("chat", models["pictures"], *LIKELIEST, "--max-tokens", 2) as terminal:
        terminal.expect(READY)
        terminal.type(f"/image {picture(tmp_path / 'a.png', 1)}\n")
        terminal.expect(READY)
        terminal.type("What?\n")
        prompt, *_ = figures(answered(terminal))
        assert prompt > 576
        terminal.type("And?\n")
        second, new, *_ = figures(answered(terminal))
        assert second > prompt
        assert new < 576
        terminal.type(f"/image {tmp_path / 'none.png'}\n")
        terminal.expect("there is no such file")
        terminal.expect(READY)
        terminal.type("/exit\n")
        assert terminal.ended() == 0


REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "no file": (("none.gguf",), "there is no such file or folder"),
    "no model": (("README.md",), "is not a GGUF file"),
    "a projector": (("pictures/mmproj-pictures.gguf",), "is a projector"),
    "no picture": (("pictures/pictures.gguf", "--image", "none.png"), "there is no such file"),
    "not a picture": (("pictures/pictures.gguf", "--image", "README.md"), "is not a picture"),
    "no projector": (("sample/sample.gguf", "--image", "a.png"), "there is none beside the file"),
    "another's projector": (
        ("parrot/parrot.gguf", "--mmproj", "pictures/mmproj-pictures.gguf"),
        "cannot be used with the text file",
    ),
    "a text file as projector": (
        ("sample/sample.gguf", "--mmproj", "sample/sample.gguf"),
        "cannot be used with the text file",
    ),
    "a projector for a folder": (("sample:", "--mmproj", "a.gguf"), "--mmproj goes with a GGUF file"),
    "pictures for a folder": (("parrot", "--image", "a.png"), "pictures are read in llama.cpp"),
    "a device of another kind": (("sample/sample.gguf", "--device", "cuda:1"), "cannot be chosen"),
    "a long question": (("sample/sample.gguf", "--context", 16), "the message does not fit"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_said(
    name: str, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in models.values():
        (tmp_path / folder.parent.name).symlink_to(folder.parent)
    (tmp_path / "README.md").write_text("# Read me\n")
    picture(tmp_path / "a.png", 0)
    monkeypatch.chdir(tmp_path)
    arguments, said = REFUSED[name]
    result = command("chat", *arguments, "--prompt", "Hello, who are you?", *LIKELIEST)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert said in result.stderr


def test_an_empty_question_is_none(models: dict[str, Path]) -> None:
    for settings in ({"input": "\n"}, {"input": ""}):
        result = command("chat", models["sample"], **settings)
        assert result.exit_code == 2
        assert "there is no question" in result.stderr


def test_llama_cpp_that_is_not_there_is_asked_for(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsconvert.runtimes import llama_h

    llama_h.open_library.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    result = command("chat", models["sample"], "--prompt", "x")
    llama_h.open_library.cache_clear()
    assert result.exit_code == 2
    assert "pip install xllamacpp" in result.stderr
