"""Experts to which too few calibration tokens came for their Hessian to say much: they are rounded plainly.

Measured on the sample's MLP matrices (256 and 768 inputs) in 2, 3 and 4 bits, by the loss on other text as a
share of round-to-nearest's: with an eighth as many tokens as inputs error feedback left .90 to 1.07 of it,
with a quarter .76 to .99, with a half .55 to .90, with as many .43 to .66, with 16 times as many .31 to .43.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsconvert.decoder.experts import Names
from dsconvert.decoder.linear_inputs import Group
from dsconvert.events import Event, Warn

ENOUGH = 1 / 4  # tokens for each input of a matrix
NAMED = 16  # experts of a block in a message


def too_few(group: Group) -> str | None:
    """Why an expert's matrices are rounded to nearest; None where enough tokens came, or all of them do."""
    inputs = len(group.moment)
    if not group.routed or group.rows >= ENOUGH * inputs:
        return None
    return f"{group.rows} calibration tokens came, a quarter of its {inputs} inputs are needed"


def told(
    experts: Sequence[Names], where: str, linears: Sequence[Mapping[str, Any]], against: str
) -> Iterator[Event]:
    """One warning on the experts of a block, from the records of its linears."""
    tokens = {one["name"]: one["tokens"] for one in linears if "tokens" in one}
    found = {
        number: next(tokens[name] for name in names if name in tokens)
        for number, names in enumerate(experts)
        if any(name in tokens for name in names)
    }
    if not found:
        return
    named = ", ".join(f"{number} ({count})" for number, count in list(found.items())[:NAMED])
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    yield Warn(
        f"{where}: {len(tokens)} of {3 * len(experts)} matrices of experts are left to {against}, as fewer "
        f"calibration tokens came than a quarter of their inputs: experts (tokens) {named}{more}; give more "
        "text by --calib-samples or --calib-len"
    )


def told_of_costs(names: Sequence[str]) -> Iterator[Event]:
    """A warning on matrices of experts whose costs few tokens tell; nothing where there are none."""
    if names:
        yield Warn(
            f"what types cost of {len(names)} matrices of experts is told by fewer calibration tokens than a "
            f"quarter of their inputs, and without error feedback: {', '.join(names[:3])}"
            f"{' and more' * (len(names) > 3)}; give more text by --calib-samples or --calib-len"
        )
