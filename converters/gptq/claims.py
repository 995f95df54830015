"""What a GPTQ folder says of its linears, held against their zero points and groups.

Runtimes go by the statement: for a symmetric model they take the middle code for every zero point, and where
`desc_act` is false they take the groups for runs of inputs, whatever is stored.
"""

from __future__ import annotations

from converters.gptq.pack import Packed, zero_points
from converters.gptq.reader import GPTQModel
from dsconvert.events import Check


def check_settings(model: GPTQModel) -> Check:
    """The folder's `sym` and `desc_act` are true of every linear; what is not stated is not judged."""
    wrong: dict[str, list[str]] = {}
    for linear in model.linears:
        for fault in false_settings(model, model.packed(linear)):
            wrong.setdefault(fault, []).append(linear)
    told = [
        f"{fault} in {len(names)} of {len(model.linears)} linears, the first is {names[0]}"
        for fault, names in wrong.items()
    ]
    stated = [f"{key} {model.settings[key]}" for key in ("sym", "desc_act") if key in model.settings]
    detail = ", ".join([*stated, "as the linears are stored"]) if stated else "no sym, no desc_act stated"
    return Check("settings", not told, "; ".join(told) or detail, sum(map(len, wrong.values())))


def false_settings(model: GPTQModel, packed: Packed) -> list[str]:
    """What a folder states of a linear and the linear is not.

    The converse is no fault: zero points in the middle are read as any others, and runs of inputs as groups.
    """
    found = []
    middle = 1 << (model.bits - 1)
    if model.settings.get("sym") is True:
        zeros = zero_points(packed, model.bits, model.checkpoint_format)
        if (zeros != middle).any():
            found.append(f"sym is true, but zero points are not all {middle}")
    if model.settings.get("desc_act") is False and (packed.g_idx != model.runs(len(packed.g_idx))).any():
        found.append("desc_act is false, but g_idx does not name runs of inputs")
    return found
