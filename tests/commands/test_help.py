"""The help of every command, to the letter, and options that mean the same wherever they stand.

After a change of an option that is meant, `python tests/commands/test_help.py` writes the texts anew.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import dsconvert
from dsconvert.cli import COMMANDS, cli

TEXTS = Path(__file__).with_name("help")
# What may differ from command to command, and why: option -> (attributes, reason).
OWN = {
    "--calib": (("default", "help"), "gguf calibrates only where a text is named"),
    "--calib-len": (("default",), "llama.cpp measures importance on 512 tokens, GPTQ and EXL2 take 2048"),
    "--out": (("default", "help"), "imatrix has a fixed name, the others are named after model and settings"),
    "--effort": (("default", "type"), "a conversion may leave the proof out, and verify proves all there is"),
}
CONVERSIONS, PROVING = ("gguf", "gptq", "exl2", "imatrix"), ("gguf", "gptq", "exl2", "verify", "compare")
OUT, EFFORT = ["-o", "--out", "--outfile"], ["--effort", "--verify"]


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
