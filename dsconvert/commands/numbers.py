"""Option types for numbers: finite ones within limits, and sizes with a unit."""

from __future__ import annotations

import math
import re
from typing import Any

import click

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}


class Number(click.FloatRange):
    """A finite number, within bounds if any; click's ranges take nan, which no comparison holds back."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes: 4G, 500M, or plain; decimal units, as llama.cpp's split tool takes them."""
    if value is None:
        return None
    found = re.fullmatch(rf"([0-9]{{1,15}})([{''.join(UNITS)}]?)B?", value.upper())
    if found is None or int(found[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a size; write 500M or 4G")
    return int(found[1]) * UNITS.get(found[2], 1)
