"""Option types for numbers: finite ones within limits, and sizes with a unit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import click

UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}
BINARY = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


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
    return _bytes(value, UNITS, "500M or 4G")


def memory(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Bytes of a card's memory: 24G, 24GB and 24GiB all say what a card that is sold as 24 GB has, 24 GiB."""
    return None if value is None else _bytes(value.upper().replace("IB", ""), BINARY, "24GB or 80GB")


def counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, with commas between them."""
    words = [word.strip() for word in value.split(",")]
    if not all(re.fullmatch(r"[1-9][0-9]{0,8}", word) for word in words):
        raise click.BadParameter(f"{value!r} is not a list of whole numbers such as 1,2,4")
    return tuple(map(int, words))


def names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    """Words in lower case, with commas between them; none where the option is not given."""
    return tuple(word.strip().lower() for word in (value or "").split(",") if word.strip())


def _bytes(value: str, units: Mapping[str, int], example: str) -> int:
    """A number with a unit as bytes, a fraction of a byte left out."""
    found = re.fullmatch(rf"([0-9]{{1,15}}(?:\.[0-9]{{1,9}})?)([{''.join(units)}]?)B?", value.upper())
    number = int(Decimal(found[1]) * units.get(found[2], 1)) if found else 0
    if number == 0:
        raise click.BadParameter(f"{value!r} is not a size; write {example}")
    return number
