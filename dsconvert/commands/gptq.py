"""`dsconvert gptq`: a checkpoint to a GPTQ folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands import solver_options as solver
from dsconvert.commands.calibration_options import calibration_options
from dsconvert.commands.publish import Publish, publish_options
from dsconvert.commands.run import command, on_each_rank

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display


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
@calibration_options("c4", 2048)
@shared.bos_option
@shared.out_option()
@shared.hub_options
@shared.resume_option
@publish_options
@shared.force_option
@shared.device_option
@solver.language_option
@solver.head_option
@shared.conversion_effort
def gptq(
    model_path: ModelPath,
    bits: int,
    group_size: int,
    act_order: bool,
    dynamic_groups: bool,
    sym: bool,
    damp: float,
    mse: bool,
    rounds: int | None,
    calibration: CalibrationRequest,
    add_bos: bool | None,
    out: Path | None,
    resume: bool,
    force: bool,
    device: str,
    language_only: bool,
    lm_head: bool,
    effort: str,
    publish: Publish,
    display: Display,
) -> int:
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
    from dsconvert.quantization.plan import RunOptions

    run = RunOptions(
        model=model_path, calibration=calibration, add_bos=add_bos, out=out, resume=resume, force=force,
        device=device, effort=effort,
    )  # fmt: skip
    options = Options(
        run=run, bits=bits, group_size=group_size, act_order=act_order, dynamic_groups=dynamic_groups,
        sym=sym, damp=damp, mse=mse, rounds=rounds,
        language_only=language_only, lm_head=lm_head,
    )  # fmt: skip
    return on_each_rank(
        lambda ranks: convert(options, ranks), lambda events: display.events(publish.after(events))
    )
