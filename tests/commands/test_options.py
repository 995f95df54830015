"""Every option of a command reaches one field of the options that its work is started with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dsconvert.cli import COMMANDS, cli
from dsconvert.commands.shared_options import DISPLAY_OPTIONS

STARTED = {
    "gguf": "converters.gguf.convert.convert",
    "gptq": "converters.gptq.convert.convert",
    "compressed": "converters.compressed.convert.convert",
    "exl2": "converters.exl2.convert.convert",
    "mlx": "converters.mlx.convert.convert",
    "imatrix": "converters.gguf.importance_file.make",
    "verify": "dsconvert.proof.prove.prove",
    "compare": "dsconvert.proof.prove.prove",
}
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "gguf": ("model", "--calib", "builtin"),
    "gptq": ("model",),
    "compressed": ("model",),
    "exl2": ("model",),
    "mlx": ("model", "--calib", "builtin"),
    "imatrix": ("model",),
    "verify": ("x.gguf", "--against", "model"),
    "compare": ("x.gguf", "--against", "model"),
}
# What is no field: it says what is opened, or where a page goes.
ELSEWHERE = {"against", "report", "backend", "mmproj of verify", "card", "push_to", "private",
             *(f"{option} of {name}" for name in ("imatrix", "verify", "compare")
               for option in ("add_bos", "revision", "cache_dir", "remote"))}  # fmt: skip
FIELDS = {"calib": "text", "calib_samples": "samples", "calib_len": "length", "calib_chat": "chat",
          "calib_column": "column", "out of gguf": "outfile"}  # fmt: skip
VALUES = {"quants": "q8_0", "overrides": "x=q8_0", "split_max_size": "7M", "max_kld": "0.25",
          "max_ppl_ratio": "0.25", "min_top1": "0.25", "bpw": "3.5", "damp": "0.25", "size": "7M",
          "vram": "7GB", "types": "q4_0,q8_0", "floor": "q4_0"}  # fmt: skip
# What has a meaning only beside another option, or in place of it.
BUDGET = dict.fromkeys(("bpw", "types", "floor", "measurement"), ("--bpw", "9"))
BUDGET |= {"size": ("--size", "1M"), "vram": ("--vram", "1GB"), "context": ("--vram", "1GB")}
SOLVER = dict.fromkeys(("rounds", "resume"), ("--solver", "gptq"))
SOLVER["solver"] = ("--calib-len", "9")  # error feedback has a default of its own
BESIDE = {"gguf": BUDGET | SOLVER, "compressed": BUDGET}


def options_of(name: str) -> list[click.Option]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    shown = len(DISPLAY_OPTIONS)
    return [option for option in command.params if isinstance(option, click.Option)][:-shown]


def cases() -> list[Any]:
    found = [(name, option) for name in STARTED for option in options_of(name)]
    kept = [(name, o) for name, o in found if not {o.name, f"{o.name} of {name}"} & ELSEWHERE]
    return [pytest.param(name, option, id=f"{name}-{option.name}") for name, option in kept]


def another(option: click.Option) -> tuple[str, ...]:
    """The words that give an option a value which is not its default."""
    if option.is_flag:
        return ((option.secondary_opts if option.default is True else option.opts)[0],)
    value = VALUES.get(str(option.name))
    if value is None and isinstance(option.type, click.Choice):
        value = next(str(choice) for choice in option.type.choices if choice != option.default)
    return option.opts[0], value or "7"


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass and of those in it."""
    if not is_dataclass(value):
        yield name, value
        return
    for field in fields(value):
        yield from leaves(getattr(value, field.name), field.name)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options that a command starts its work with; the work itself is left out."""
    seen: list[Any] = []

    def stop(*arguments: Any) -> Any:
        seen.extend(value for value in arguments if is_dataclass(value))
        raise click.exceptions.Exit(0)

    for name in set(STARTED.values()):
        monkeypatch.setattr(name, stop)
    for name in ("converters.outputs.open_reference", "converters.outputs.open_output"):
        monkeypatch.setattr(name, lambda *arguments: None)
    monkeypatch.setattr("converters.gguf.projector.verify.is_projector_file", lambda path: False)
    return seen


def options_with(started: list[Any], name: str, words: tuple[str, ...]) -> dict[str, Any]:
    started.clear()
    CliRunner().invoke(cli, [name, *ARGUMENTS[name], *words])
    return dict(leaves(started[0]))


@pytest.mark.parametrize(("name", "option"), cases())
def test_an_option_reaches_its_field_and_no_other(
    name: str, option: click.Option, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name in ("gguf", "mlx") and option.name == "calib_chat":
        monkeypatch.setitem(ARGUMENTS, name, ("model",))  # a text of its own, beside which --calib is refused
        assert options_with(started, name, another(option))["chat"] == Path("7")
        return
    beside = BESIDE.get(name, {}).get(str(option.name), ())
    monkeypatch.setitem(ARGUMENTS, name, (*ARGUMENTS[name], *beside))
    before, after = options_with(started, name, ()), options_with(started, name, another(option))
    assert before.keys() == after.keys()
    changed = {field for field in before if before[field] != after[field]}
    assert changed == {
        FIELDS.get(str(option.name), option.name if option.name != "out" or name != "gguf" else "outfile")
    }


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_names_every_parameter(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.callback is not None
    kinds = {
        parameter.kind
        for parameter in inspect.signature(inspect.unwrap(command.callback)).parameters.values()
    }
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
