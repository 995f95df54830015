"""The options of conversions that GPTQ's solver serves, each defined once."""

from __future__ import annotations

import click

from dsconvert.commands.shared_options import integer

group_size_option = click.option(
    "-g",
    "--group-size",
    type=click.Choice(["32", "64", "128", "-1"]),
    default="128",
    show_default=True,
    callback=integer,
    help="Inputs that share a scale; -1: all of a row.",
)
act_order_option = click.option(
    "--act-order/--no-act-order",
    default=True,
    show_default=True,
    help="Solve the inputs of largest activation first; the groups stay where they are.",
)
sym_option = click.option(
    "--sym/--asym", default=True, show_default=True, help="One zero point for all, or one per group."
)
mse_option = click.option(
    "--mse/--no-mse",
    default=True,
    show_default=True,
    help="Search each scale for the least squared error, weighted by what it costs; or min-max.",
)
rounds_option = click.option(
    "--rounds",
    type=click.IntRange(0, 100),
    metavar="N",
    help="How often scales, zero points and codes are refined in turn after the walk.  [default: 1 for 2 and "
    "3 bits, else 0]",
)
language_option = click.option(
    "--language-only",
    is_flag=True,
    help="Of a model with a vision tower, a plain folder of its language model.",
)
head_option = click.option(
    "--lm-head", is_flag=True, help="Quantize the output layer too, which not every runtime reads."
)
