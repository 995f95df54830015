"""The help of every command, to the letter, and options that mean the same wherever they stand.

After a change of an option that is meant, `python tests/commands/test_help.py` writes the texts and the
manual pages anew.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import click
import pytest
from click.testing import CliRunner

import dsconvert
from dsconvert.cli import COMMANDS, cli

ROOT, TEXTS = Path(__file__).parents[2], Path(__file__).with_name("help")
# What may differ from command to command, and why: option -> (attributes, reason).
OWN = {
    "--bpw": (
        ("metavar", "type", "default", "help"),
        "exl2 counts the blocks' linears and needs a rate, gguf counts the whole file",
    ),
    "--context": (("metavar", "type", "help"), "chat may have so much, gguf leaves room for it"),
    "--vram": (("help",), "memory says what fits, gguf makes it fit"),
    "--types": (("help",), "memory leaves rows out, gguf chooses among them"),
    "--calib": (("default", "help"), "gguf calibrates only where a text is named"),
    "--calib-len": (("default",), "llama.cpp measures importance on 512 tokens, GPTQ and EXL2 take 2048"),
    "--out": (("default", "help"), "imatrix has a fixed name, the others are named after model and settings"),
    "--bits": (("type",), "each format has widths of its own"),
    "--group-size": (("type", "default", "help"), "MLX has no whole rows, and another default"),
    "--head-bits": (
        ("default", "help"),
        "exl2 has a head alone, 6 bits wide; MLX an embedding of the same bits",
    ),
    "--rounds": (("default", "help"), "gguf has a default by type, and takes it with --solver gptq"),
    "--effort": (("default", "type"), "a conversion may leave the proof out, and verify proves all there is"),
}
CONVERSIONS = ("gguf", "gptq", "compressed", "mlx", "exl2", "imatrix")
PROVING = ("gguf", "gptq", "compressed", "mlx", "exl2", "verify", "compare")
OUT, EFFORT = ["-o", "--out", "--outfile"], ["--effort", "--verify"]


def manual() -> ModuleType:
    """The program that writes the manual pages."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "man" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def help_of(*words: str) -> str:
    result = CliRunner().invoke(cli, [*words, "--help"], prog_name="dsconvert", terminal_width=100)
    assert result.exit_code == 0
    return result.output


def options_of(name: str) -> list[click.Option]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "dsconvert")
def test_the_help_is_this_text(name: str) -> None:
    expected = (TEXTS / f"{name or 'dsconvert'}.txt").read_text(encoding="utf-8")
    assert help_of(*name.split()) == expected


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "dsconvert")
def test_h_is_help(name: str) -> None:
    short = CliRunner().invoke(cli, [*name.split(), "-h"], prog_name="dsconvert", terminal_width=100)
    assert short.exit_code == 0
    assert short.output == help_of(*name.split())


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "dsconvert")
def test_the_help_has_an_example_that_the_command_takes(name: str) -> None:
    shown = re.search(r"\n  Example:\n((?:    .+\n)+)", help_of(*name.split()))
    assert shown, "end the docstring with an example"
    for line in shown[1].splitlines():
        words = shlex.split(line.strip().removeprefix('eval "$(').removesuffix(')"'))
        assert words[0] == "dsconvert"
        assert words[1] == name or not name
        parent = click.Context(cli, **cli.context_settings)
        command = cli.get_command(parent, words[1])
        assert command is not None
        command.make_context(words[1], words[2:], parent=parent)  # raises for what it does not take


@pytest.mark.parametrize("name", ["", *COMMANDS], ids=lambda name: name or "dsconvert")
def test_the_manual_page_is_this_text_and_builds(name: str) -> None:
    pages = manual()
    assert pages.path_of(name).read_text(encoding="utf-8") == pages.page(name)
    if shutil.which("groff") is None:
        pytest.skip("needs groff")
    done = subprocess.run(
        ["groff", "-ww", "-man", "-Tutf8", str(pages.path_of(name))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not done.stderr
    shown = re.sub(r"\x1b\[[\d;]*m|.\x08", "", done.stdout).replace("\N{HYPHEN}\n", "")
    sections = re.findall(r"^[A-Z ]+$", shown, re.MULTILINE)
    assert [s for s in sections if s.strip()] == [
        "NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS", "SEE ALSO"
    ]  # fmt: skip
    flat = " ".join(shown.split())
    for option in options_of(name) if name else []:
        former = getattr(option, "former", ())
        assert all(spelling in flat for spelling in option.opts if spelling not in former)


def test_every_manual_page_belongs_to_a_command() -> None:
    pages = manual()
    assert set((ROOT / "man").glob("*.1")) == {pages.path_of(name) for name in ("", *COMMANDS)}


def test_the_version_is_shown() -> None:
    result = CliRunner().invoke(cli, ["--version"])
    assert (result.exit_code, result.output) == (0, f"dsconvert, version {dsconvert.__version__}\n")


def test_an_option_is_the_same_in_every_command() -> None:
    seen: dict[str, dict[str, tuple[object, ...]]] = defaultdict(dict)
    for name in COMMANDS:
        for option in options_of(name):
            facts = {
                "name": option.name,
                "spellings": tuple(option.opts + option.secondary_opts),
                "metavar": option.metavar,
                "type": str(option.type.to_info_dict()),
                "default": option.default,
                "help": option.help,
            }
            long = next(spelling for spelling in option.opts if spelling.startswith("--"))
            for free in OWN.get(long, ((), ""))[0]:
                del facts[free]
            seen[long][name] = tuple(facts.items())
    shared = {option: by_command for option, by_command in seen.items() if len(by_command) > 1}
    assert {
        "--out",
        "--json",
        "--quiet",
        "--debug",
        "--device",
        "--force",
        "--seed",
        "--effort",
    } <= shared.keys()
    for option, by_command in shared.items():
        assert len(set(by_command.values())) == 1, f"{option} differs: {by_command}"
    for option, (attributes, why) in OWN.items():
        assert option in shared, f"{option} is shared no more: take it out of OWN"
        assert attributes
        assert why


def test_every_option_says_what_it_does() -> None:
    for name in COMMANDS:
        for option in options_of(name):
            assert option.help, f"{name} {option.opts}"
            assert option.help.endswith((".", "]")), f"{name} {option.opts}: {option.help}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_json_quiet_and_debug_last(name: str) -> None:
    assert [option.opts[0] for option in options_of(name)][-3:] == ["--json", "--quiet", "--debug"]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_is_named_by_any_of_its_spellings_and_effort_by_its_former_one(name: str) -> None:
    spellings = {option.name: option.opts for option in options_of(name)}
    assert ("out" in spellings) == (name in CONVERSIONS)
    assert ("effort" in spellings) == (name in PROVING)
    assert spellings.get("out", OUT) == OUT
    assert spellings.get("effort", EFFORT) == EFFORT


if __name__ == "__main__":
    TEXTS.mkdir(exist_ok=True)
    for command in ("", *COMMANDS):
        (TEXTS / f"{command or 'dsconvert'}.txt").write_text(help_of(*command.split()), encoding="utf-8")
    manual().write()
