"""`dsconvert compressed`: a checkpoint to a compressed-tensors folder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands import solver_options as solver
from dsconvert.commands.block_wise import block_wise
from dsconvert.commands.budget_options import budget_options
from dsconvert.commands.given import given, refuse
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.block_wise import Work
    from dsconvert.quantization.budget import Budget
    from dsconvert.quantization.plan import RunOptions


INTEGERS = ("w2a16", "w3a16", "w4a16", "w5a16", "w6a16", "w8a16")
FLOATS = ("fp8-block", "nvfp4a16", "mxfp4a16")
FED = ("nvfp4a16", "mxfp4a16")  # by error feedback where a text is named
INTEGER = ("group_size", "sym", "rounds")
# What has no effect where weights are rounded to nearest.
SOLVER = ("act_order", "damp", "mse", "resume")
TEXT = ("calib", "calib_chat", "calib_column", "calib_samples", "calib_len", "seed")


@command
@shared.model_argument
@click.option(
    "-s",
    "--scheme",
    type=click.Choice([*INTEGERS, *FLOATS]),
    default="w4a16",
    show_default=True,
    help="Bits of weights (w) and of activations (a), or a format of small floats.",
)
@budget_options(
    "scheme",
    named="--scheme",
    counted="in the linears that are quantized",
    usual="w3a16 to w8a16, each in groups of 32, 64, 128; w2a16 where a size asks for it",
)
@solver.group_size_option
@solver.act_order_option
@solver.sym_option
@shared.damp_option
@solver.mse_option
@solver.rounds_option
@solver.language_option
@solver.head_option
@block_wise()
def compressed(
    run: RunOptions,
    scheme: str,
    budget: Budget | None,
    group_size: int,
    act_order: bool,
    sym: bool,
    damp: float,
    mse: bool,
    rounds: int | None,
    language_only: bool,
    lm_head: bool,
) -> Work:
    """Quantize a checkpoint for vLLM, SGLang and transformers (compressed-tensors), and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Integers are solved by GPTQ with calibration, block by block, and where
    --calib is given nvfp4a16 and mxfp4a16 too; else these and fp8-block are rounded to nearest. Several GPUs:
    torchrun --nproc-per-node N -m dsconvert compressed ... Exit code 0: quantized and proven, 2: stopped,
    3: a check failed.

    \b
    Example:
      dsconvert compressed sample: --scheme w4a16 --calib builtin --calib-samples 32
      dsconvert compressed sample: --bpw 4.5 --calib builtin --calib-samples 32
    """  # fmt: skip
    fed = scheme in FED and bool(given("calib", "calib_chat"))
    if scheme in FLOATS:
        refuse(*INTEGER, where=f"with {scheme}", hint="Leave it out, or choose a scheme of integers")
    if scheme in FLOATS and not fed:
        hint = "Give --calib c4 too" if scheme in FED else "Leave it out, or choose a scheme of integers"
        refuse(*SOLVER, *TEXT, where=f"with {scheme}, which is rounded to nearest", hint=hint)
    from converters.compressed.convert import convert
    from converters.compressed.plan import Options

    options = Options(
        run=run, scheme=scheme, group_size=group_size, act_order=act_order, sym=sym, damp=damp, mse=mse,
        rounds=rounds, language_only=language_only, lm_head=lm_head, fed=fed, budget=budget,
    )  # fmt: skip
    if budget is not None and given("group_size"):
        options = replace(options, group_sizes=(group_size,))
    return partial(convert, options)
