"""The options that several commands take, each defined once: same name, metavar, default and help."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from dsconvert.commands.numbers import Number

Command = TypeVar("Command", bound=Callable[..., Any])


class Renamed(click.Option):
    """An option with `former` spellings, which still work and which the help text leaves out."""

    def __init__(self, names: Iterable[str], former: tuple[str, ...] = (), **settings: Any) -> None:
        super().__init__([*names, *former], **settings)
        self.former = former

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown = copy.copy(self)
        shown.opts = [name for name in self.opts if name not in self.former]
        return click.Option.get_help_record(shown, ctx)


def apply(command: Command, options: Iterable[Callable[[Command], Command]]) -> Command:
    """Add options to a command, in the order in which its help lists them."""
    for option in reversed(list(options)):
        command = option(command)
    return command


def _json_target(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A file that is named as JSON, or standard output: anything else was meant as an argument."""
    if value is not None and str(value) != "-" and value.suffix not in (".json", ".jsonl"):
        raise click.BadParameter(
            f"{str(value)!r} does not end in .json or .jsonl; for standard output write `--json -`",
            ctx,
            param,
        )
    return value


def integer(ctx: click.Context, param: click.Parameter, value: str | None) -> int:
    """The number that one of several choices is, 0 where none was made."""
    return int(value or 0)


model_argument = click.argument("model_path", required=False, default="")
# How a model on the hub is fetched; the first means the model that a command names.
HUB_OPTIONS = (
    click.option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit of a model on the hub, as NAME@REV says it too.",
    ),
    click.option(
        "--cache-dir",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Where models of the hub are downloaded to.  [default: the hub's own cache]",
    ),
    click.option(
        "--remote",
        is_flag=True,
        help="Download nothing: read a model on the hub where it is, as it is needed (safetensors).",
    ),
)


def hub_options(command: Command) -> Callable[..., Any]:
    """Add the options on the hub to a command, which receives its MODEL_PATH with them, as a ModelPath."""

    @wraps(command)
    def with_model(
        *, model_path: str, revision: str | None, cache_dir: Path | None, remote: bool, **others: Any
    ) -> Any:
        from dsconvert.checkpoints.locate import ModelPath

        return command(model_path=ModelPath(model_path, revision, cache_dir, remote), **others)

    return apply(with_model, HUB_OPTIONS)


def out_option(default: str | None = None) -> Callable[[Command], Command]:
    """The option that names the output; without a `default` it is named after model and settings."""
    return click.option(
        "-o",
        "--out",
        "--outfile",
        "out",
        type=click.Path(path_type=Path),
        metavar="PATH",
        default=default,
        show_default=default is not None,
        help="Output file or folder." + ("" if default else "  [default: named after model and settings]"),
    )


force_option = click.option(
    "--force",
    is_flag=True,
    help="Replace an earlier output and drop an unfinished run, never what is read or made by others.",
)
resume_option = click.option(
    "--resume", is_flag=True, help="Go on with a run that was stopped, to the same bytes."
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda|cuda:N",
    help="Device of calibration, of proofs in torch, and of a chat.",
)
threads_option = click.option(
    "--threads", type=click.IntRange(1, 256), help="Worker threads.  [default: one per core]"
)
damp_option = click.option(
    "--damp",
    type=Number(0, 1),
    default=0.05,
    show_default=True,
    help="Fraction of the mean of H's diagonal that is added to it.",
)
measurement_option = click.option(
    "--measurement",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What each setting costs: read from FILE if it exists, else measured and written to it.",
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of what is drawn at random."
)
bos_option = click.option(
    "--add-bos/--no-add-bos",
    default=None,
    help="Put BOS before a text, or not, whatever the tokenizer's files say.",
)
mmproj_option = click.option(
    "--mmproj",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The projector that belongs to the text file: gguf writes it, verify proves it, chat sees by it.",
)


def effort_option(choices: Sequence[str], default: str) -> Callable[[Command], Command]:
    """The option on how much of an output is proven; only a conversion may choose `off`."""
    return click.option(
        "--effort",
        "effort",
        cls=Renamed,
        former=("--verify",),
        type=click.Choice(choices),
        default=default,
        show_default=True,
        help="How much of the output is proven against the checkpoint: quick: some 20 seconds of work, of a "
        "big model a sample of its blocks; full: all of it.",
    )


conversion_effort = effort_option(("off", "quick", "full"), "quick")
proof_effort = effort_option(("quick", "full"), "full")
DISPLAY_OPTIONS = (
    click.option(
        "--json",
        "json_file",
        type=click.Path(path_type=Path),
        metavar="[FILE]",
        is_flag=False,
        flag_value="-",
        callback=_json_target,
        help="Write events and results as JSON, one object a line, into FILE (.json, .jsonl), which replaces "
        "only JSON of dsconvert; - or nothing: to standard output, instead of text.",
    ),
    click.option("--quiet", is_flag=True, help="Show warnings and failures only."),
    click.option("--debug", is_flag=True, help="Show the traceback of an error, and how long phases take."),
)
