"""`dsconvert exl2`: a checkpoint to an EXL2 folder for exllamav2."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.block_wise import block_wise
from dsconvert.commands.given import given
from dsconvert.commands.numbers import Number
from dsconvert.commands.run import command
from dsconvert.errors import UsageError

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.commands.block_wise import Work
    from dsconvert.quantization.plan import RunOptions


@command
@shared.model_argument
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
    callback=shared.integer,
    help="Bits of the head; 16: as it is.",
)
@shared.measurement_option
@shared.damp_option
@click.option(
    "--backend",
    type=click.Choice(["dsconvert", "exllamav2"]),
    default="dsconvert",
    show_default=True,
    help="exllamav2: drive that package's own converter (needs it, and CUDA).",
)
@block_wise()
def exl2(
    run: RunOptions,
    bpw: float,
    head_bits: int,
    measurement: Path | None,
    damp: float,
    backend: str,
) -> Work:
    """Quantize a checkpoint to EXL2: measure every linear, share out the bits, solve, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Of a model with a vision tower the language model is quantized and the rest
    written beside it. Several GPUs: torchrun --nproc-per-node N -m dsconvert exl2 ... Exit code 0: quantized
    and proven, 2: stopped, 3: a check failed.

    \b
    Example:
      dsconvert exl2 sample: --bpw 4.5 --calib builtin --calib-samples 32
    """  # fmt: skip
    from converters.exl2.plan import Options

    options = Options(run=run, bpw=bpw, head_bits=head_bits, damp=damp, measurement=measurement)
    if backend == "exllamav2":
        from converters.exl2 import backend as exllamav2

        check_exllamav2(run.calibration)
        return lambda ranks: exllamav2.convert(options)
    from converters.exl2.convert import convert

    return partial(convert, options)


def check_exllamav2(calibration: CalibrationRequest) -> None:
    """Raises UsageError for options that exllamav2's converter does not take: it draws its own text."""
    names = ["damp", "calib_chat", "calib_column", "seed", "offline", "device", "measurement"]
    if not calibration.text.endswith(".parquet"):
        names += ["calib", "calib_samples", "calib_len"]
    if options := given(*names):
        raise UsageError(
            f"--backend exllamav2 takes no {', '.join(options)}",
            why="That converter damps, draws and places by itself, on its own text or a .parquet file",
            hint="Leave it out, give --calib FILE.parquet, or leave --backend out",
        )
