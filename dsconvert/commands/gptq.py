"""`dsconvert gptq`: a checkpoint to a GPTQ folder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands import solver_options as solver
from dsconvert.commands.block_wise import block_wise
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.block_wise import Work
    from dsconvert.quantization.plan import RunOptions


@command
@shared.model_argument
@click.option(
    "-b",
    "--bits",
    type=click.Choice(["2", "3", "4", "8"]),
    default="4",
    show_default=True,
    callback=shared.integer,
    help="Bits per weight.",
)
@solver.group_size_option
@solver.act_order_option
@click.option(
    "--dynamic-groups", is_flag=True, help="Groups in activation order (desc_act), as old files have."
)
@solver.sym_option
@shared.damp_option
@solver.mse_option
@solver.rounds_option
@solver.language_option
@solver.head_option
@block_wise()
def gptq(
    run: RunOptions,
    bits: int,
    group_size: int,
    act_order: bool,
    dynamic_groups: bool,
    sym: bool,
    damp: float,
    mse: bool,
    rounds: int | None,
    language_only: bool,
    lm_head: bool,
) -> Work:
    """Quantize a checkpoint by GPTQ with calibration, block by block, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Several GPUs: torchrun --nproc-per-node N -m dsconvert gptq ... Exit code 0:
    quantized and proven, 2: stopped, 3: a check failed.

    \b
    Example:
      dsconvert gptq sample: --bits 4 --calib builtin --calib-samples 32
    """  # fmt: skip
    from converters.gptq.convert import convert
    from converters.gptq.plan import Options

    options = Options(
        run=run, bits=bits, group_size=group_size, act_order=act_order, dynamic_groups=dynamic_groups,
        sym=sym, damp=damp, mse=mse, rounds=rounds,
        language_only=language_only, lm_head=lm_head,
    )  # fmt: skip
    return partial(convert, options)
