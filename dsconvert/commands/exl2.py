"""`dsconvert exl2`: a checkpoint to an EXL2 folder for exllamav2."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.calibration_options import calibration_options
from dsconvert.commands.given import given
from dsconvert.commands.numbers import Number
from dsconvert.commands.publish import Publish, publish_options
from dsconvert.commands.run import command, on_each_rank
from dsconvert.errors import UsageError

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display


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
@calibration_options("c4", 2048)
@shared.bos_option
@shared.out_option()
@shared.hub_options
@shared.resume_option
@publish_options
@shared.force_option
@shared.device_option
@click.option(
    "--backend",
    type=click.Choice(["dsconvert", "exllamav2"]),
    default="dsconvert",
    show_default=True,
    help="exllamav2: drive that package's own converter (needs it, and CUDA).",
)
@shared.conversion_effort
def exl2(
    model_path: ModelPath,
    bpw: float,
    head_bits: int,
    measurement: Path | None,
    damp: float,
    calibration: CalibrationRequest,
    add_bos: bool | None,
    out: Path | None,
    resume: bool,
    force: bool,
    device: str,
    backend: str,
    effort: str,
    publish: Publish,
    display: Display,
) -> int:
    """Quantize a checkpoint to EXL2: measure every linear, share out the bits, solve, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Of a model with a vision tower the language model is quantized and the rest
    written beside it. Several GPUs: torchrun --nproc-per-node N -m dsconvert exl2 ... Exit code 0: quantized
    and proven, 2: stopped, 3: a check failed.

    \b
    Example:
      dsconvert exl2 sample: --bpw 4.5 --calib builtin --calib-samples 32
    """  # fmt: skip
    from converters.exl2 import backend as exllamav2
    from converters.exl2.convert import convert
    from converters.exl2.plan import Options
    from dsconvert.quantization.plan import RunOptions

    if backend == "exllamav2":
        check_exllamav2(calibration)
    run = RunOptions(
        model=model_path, calibration=calibration, add_bos=add_bos, out=out, resume=resume, force=force,
        device=device, effort=effort,
    )  # fmt: skip
    options = Options(run=run, bpw=bpw, head_bits=head_bits, damp=damp, measurement=measurement)
    if backend == "exllamav2":
        return display.events(exllamav2.convert(options))
    return on_each_rank(
        lambda ranks: convert(options, ranks), lambda events: display.events(publish.after(events))
    )


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
