"""`dsconvert exl2`: a checkpoint to an EXL2 folder for exllamav2."""

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


def check_other(calib: str) -> None:
    """Raises UsageError for what exllamav2's converter takes from nobody: it has a text of its own."""
    from dsconvert.commands.given import given
    from dsconvert.errors import UsageError

    names = ["damp", "calib_chat", "calib_column", "seed", "offline", "device", "measurement"]
    if not calib.endswith(".parquet"):
        names += ["calib", "calib_samples", "calib_len"]
    if found := given(*names):
        raise UsageError(
            f"--backend exllamav2 takes no {', '.join(found)}",
            why="That converter damps, draws and places by itself, on its own text or a .parquet file",
            hint="Leave it out, give --calib FILE.parquet, or leave --backend out",
        )


@click.command()
@click.argument("model_path", required=False, default="")
@click.option(
    "-b",
    "--bpw",
    type=Number(2, 8),
    default=4.0,
    show_default=True,
    help="Bits per weight of the blocks' linears, on average; head and embedding are not counted.",
)
@click.option(
    "--head-bits",
    type=click.Choice(["2", "3", "4", "5", "6", "8", "16"]),
    default="6",
    show_default=True,
    callback=_number,
    help="Bits of the head; 16: as it is.",
)
@click.option(
    "--measurement",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What each setting costs, of an earlier run; made and written there when new.",
)
@click.option(
    "--damp",
    type=Number(0, 1),
    default=0.05,
    show_default=True,
    help="Fraction of the mean of H's diagonal that is added to it.",
)
@calibration_options("c4", 2048)
@bos_option
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Output folder; default MODEL-exl2-4.0bpw here.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped, to the same bytes.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace a model folder that holds nothing else and no input, or drop an unfinished run.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--backend",
    type=click.Choice(["dsconvert", "exllamav2"]),
    default="dsconvert",
    show_default=True,
    help="exllamav2: drive that package's own converter (needs it, and CUDA).",
)
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
def exl2(model_path: str, backend: str, as_json: bool, quiet: bool, debug: bool, **asked: Any) -> None:
    """Quantize a checkpoint to EXL2: measure every linear, share out the bits, solve, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Of a model with a vision tower the language model is quantized and the rest
    written beside it. Several GPUs: torchrun --nproc-per-node N -m dsconvert exl2 ... Exit code 0: quantized
    and proven, 2: stopped, 3: a check failed.
    """  # fmt: skip

    def work() -> int:
        from converters.exl2 import backend as other
        from converters.exl2.convert import convert
        from converters.exl2.plan import Options
        from dsconvert import console

        if backend == "exllamav2":
            check_other(asked["calib"])
        options = Options(run_options_of(model_path, asked), **asked)

        def show(events: Iterator[Event]) -> int:
            return console.render(events, as_json=as_json, quiet=quiet)

        if backend == "exllamav2":
            return show(other.convert(options))
        return on_each_rank(lambda ranks: convert(options, ranks), show)

    run(work, as_json=as_json, debug=debug)
