"""`dsconvert mlx`: a checkpoint to an MLX folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands import solver_options as solver
from dsconvert.commands.calibration_options import calibration_options
from dsconvert.commands.given import refuse
from dsconvert.commands.publish import Publish, publish_options
from dsconvert.commands.run import command, on_each_rank

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display

WIDTHS = ("2", "3", "4", "5", "6", "8")
# What has no effect where weights are rounded to nearest.
SOLVER = ("act_order", "damp", "mse", "resume")


@command
@shared.model_argument
@click.option(
    "-b",
    "--bits",
    type=click.Choice(WIDTHS),
    default="4",
    show_default=True,
    callback=shared.integer,
    help="Bits per weight.",
)
@click.option(
    "-g",
    "--group-size",
    type=click.Choice(["32", "64", "128"]),
    default="64",
    show_default=True,
    callback=shared.integer,
    help="Inputs that share a scale and a bias.",
)
@click.option(
    "--head-bits",
    type=click.Choice([*WIDTHS, "16"]),
    callback=shared.integer,
    help="Bits of embedding and head; 16: as they are.  [default: as --bits]",
)
@solver.act_order_option
@shared.damp_option
@solver.mse_option
@calibration_options(None, 2048, "; without one weights are rounded to nearest.")
@shared.bos_option
@shared.out_option()
@shared.hub_options
@shared.resume_option
@publish_options
@shared.force_option
@shared.device_option
@solver.language_option
@shared.conversion_effort
def mlx(
    model_path: ModelPath,
    bits: int,
    group_size: int,
    head_bits: int,
    act_order: bool,
    damp: float,
    mse: bool,
    calibration: CalibrationRequest | None,
    add_bos: bool | None,
    out: Path | None,
    resume: bool,
    force: bool,
    device: str,
    language_only: bool,
    effort: str,
    publish: Publish,
    display: Display,
) -> int:
    """Quantize a checkpoint to an MLX folder for mlx-lm on Apple's machines, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. With --calib the blocks are solved by GPTQ; without, weights are rounded as
    mlx_lm.convert does, to the same bytes. Several GPUs: torchrun --nproc-per-node N -m dsconvert mlx ...
    Exit code 0: quantized and proven, 2: stopped, 3: a check failed.

    \b
    Example:
      dsconvert mlx sample: --bits 4 --calib builtin --calib-samples 32
    """  # fmt: skip
    from converters.mlx.convert import convert
    from converters.mlx.plan import Options
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.quantization.plan import RunOptions

    if calibration is None:
        refuse(
            *SOLVER,
            where="without --calib: weights are rounded to nearest",
            hint="Leave it out, or calibrate",
        )
    run = RunOptions(
        model=model_path, calibration=calibration or CalibrationRequest(), add_bos=add_bos, out=out,
        resume=resume, force=force, device=device, effort=effort,
    )  # fmt: skip
    options = Options(
        run=run, bits=bits, group_size=group_size, head_bits=head_bits, calibrated=calibration is not None,
        act_order=act_order, damp=damp, mse=mse, language_only=language_only,
    )  # fmt: skip
    return on_each_rank(
        lambda ranks: convert(options, ranks), lambda events: display.events(publish.after(events))
    )
