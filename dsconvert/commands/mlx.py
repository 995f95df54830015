"""`dsconvert mlx`: a checkpoint to an MLX folder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands import solver_options as solver
from dsconvert.commands.block_wise import block_wise
from dsconvert.commands.given import given, refuse
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.block_wise import Work
    from dsconvert.quantization.plan import RunOptions

WIDTHS = ("2", "3", "4", "5", "6", "8")
# What has no effect where weights are rounded to nearest.
SOLVER = ("act_order", "damp", "mse", "rounds", "resume")


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
@solver.rounds_option
@solver.language_option
@block_wise(None, "; without one weights are rounded to nearest.")
def mlx(
    run: RunOptions,
    bits: int,
    group_size: int,
    head_bits: int,
    act_order: bool,
    damp: float,
    mse: bool,
    rounds: int | None,
    language_only: bool,
) -> Work:
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

    calibrated = bool(given("calib", "calib_chat"))
    if not calibrated:
        refuse(
            *SOLVER,
            where="without --calib: weights are rounded to nearest",
            hint="Leave it out, or calibrate",
        )
    options = Options(
        run=run, bits=bits, group_size=group_size, head_bits=head_bits, calibrated=calibrated,
        act_order=act_order, damp=damp, mse=mse, rounds=rounds, language_only=language_only,
    )  # fmt: skip
    return partial(convert, options)
