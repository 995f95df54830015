"""`dsconvert gptq`: a checkpoint to a GPTQ folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands.calibration_options import bos_option, calibration_options, run_options_of
from dsconvert.commands.numbers import Number
from dsconvert.commands.run import on_each_rank, run

if TYPE_CHECKING:
    from dsconvert.events import Event


def _number(ctx: click.Context, param: click.Parameter, value: str) -> int:
    return int(value)


@click.command()
@click.argument("model_path", required=False, default="")
@click.option(
    "-b",
    "--bits",
    type=click.Choice(["2", "3", "4", "8"]),
    default="4",
    show_default=True,
    callback=_number,
    help="Bits per weight.",
)
@click.option(
    "-g",
    "--group-size",
    type=click.Choice(["32", "64", "128", "-1"]),
    default="128",
    show_default=True,
    callback=_number,
    help="Inputs that share a scale; -1: all of a row.",
)
@click.option(
    "--act-order/--no-act-order",
    default=True,
    show_default=True,
    help="Solve the inputs of largest activation first; the groups stay where they are.",
)
@click.option(
    "--dynamic-groups", is_flag=True, help="Groups in activation order (desc_act), as old files have."
)
@click.option(
    "--sym/--asym", default=True, show_default=True, help="One zero point for all, or one per group."
)
@click.option(
    "--damp",
    type=Number(0, 1),
    default=0.05,
    show_default=True,
    help="Fraction of the mean of H's diagonal that is added to it.",
)
@click.option(
    "--mse/--no-mse",
    default=True,
    show_default=True,
    help="Search each scale for the least squared error, weighted by what it costs; or min-max.",
)
@calibration_options("c4", 2048)
@bos_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Output folder; default MODEL-gptq-4bit-128g here.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped, to the same bytes.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace a model folder that holds nothing else and no input, or drop an unfinished run.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--language-only",
    is_flag=True,
    help="Of a model with a vision tower, a plain folder of its language model.",
)
@click.option("--lm-head", is_flag=True, help="Quantize the output layer too, which not every runtime reads.")
@click.option(
    "--verify",
    type=click.Choice(["off", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How much of the result is proven against the checkpoint.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for everything that happens.")
@click.option("--quiet", is_flag=True, help="Only warnings and failures.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def gptq(model_path: str, as_json: bool, quiet: bool, debug: bool, **asked: Any) -> None:
    """Quantize a checkpoint by GPTQ with calibration, block by block, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Several GPUs: torchrun --nproc-per-node N -m dsconvert gptq ... Exit code 0:
    quantized and proven, 2: stopped, 3: a check failed.
    """  # fmt: skip

    def work() -> int:
        from converters.gptq.convert import convert
        from converters.gptq.plan import Options
        from dsconvert import console

        def show(events: Iterator[Event]) -> int:
            return console.render(events, as_json=as_json, quiet=quiet)

        options = Options(run_options_of(model_path, asked), **asked)
        return on_each_rank(lambda ranks: convert(options, ranks), show)

    run(work, as_json=as_json, debug=debug)
