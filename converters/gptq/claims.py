"""What a GPTQ folder says of its linears, held against their zero points and groups.

Runtimes go by the statement: for a symmetric model they take the middle code for every zero point, and where
`desc_act` is false they take the groups for runs of inputs, whatever is stored.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.gptq.pack import zero_points
from converters.gptq.reader import Stated, packed, runs
from dsconvert.checkpoints.quantized import Linear
from dsconvert.events import Check


def check_settings(linears: Mapping[str, Linear[Stated]], settings: Stated) -> Check:
    """The folder's `sym` and `desc_act` are true of every linear; what is not stated is not judged."""
    wrong: dict[str, list[str]] = {}
    for name, linear in linears.items():
        for fault in false_settings(linear):
            wrong.setdefault(fault, []).append(name)
    told = [
        f"{fault} in {len(names)} of {len(linears)} linears, the first is {names[0]}"
        for fault, names in wrong.items()
    ]
    stated = [f"{key} {settings.keys[key]}" for key in ("sym", "desc_act") if key in settings.keys]
    detail = ", ".join([*stated, "as the linears are stored"]) if stated else "no sym, no desc_act stated"
    return Check("settings", not told, "; ".join(told) or detail, sum(map(len, wrong.values())))


def false_settings(linear: Linear[Stated]) -> list[str]:
    """What a folder states of a linear and the linear is not.

    The converse is no fault: zero points in the middle are read as any others, and runs of inputs as groups.
    """
    found, stored, settings = [], packed(linear), linear.settings
    middle = 1 << (settings.bits - 1)
    if (
        settings.keys.get("sym") is True
        and (zero_points(stored, settings.bits, settings.form) != middle).any()
    ):
        found.append(f"sym is true, but zero points are not all {middle}")
    if settings.keys.get("desc_act") is False and (stored.g_idx != runs(linear)).any():
        found.append("desc_act is false, but g_idx does not name runs of inputs")
    return found
