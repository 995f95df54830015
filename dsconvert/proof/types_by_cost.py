"""What an output says of how its types were chosen by cost, for the report."""

from __future__ import annotations

from array import array

from dsconvert.proof.sources import Opened


def types_by_cost(opened: Opened) -> dict[str, str]:
    """The request, what was foretold of the file, and of other sizes; {} for one that says nothing."""
    names = ("asked", "foretold_kl", "curve_bytes", "curve_kl")
    asked, foretold, *curve = (opened.by_cost.get(name) for name in names)
    if not isinstance(asked, str) or not isinstance(foretold, float):
        return {}
    found = {"types": f"by cost for {asked[:80]}, foretold KL {foretold:.3g}"}
    if all(isinstance(values, list | array) for values in curve):
        pairs = [pair for pair in zip(*curve, strict=False) if all(isinstance(v, int | float) for v in pair)]
        points = dict.fromkeys(f"{nbytes:,} bytes {cost:.3g}" for nbytes, cost in pairs[:64])
        found["other sizes' foretold KL"] = "; ".join(points)
    return found
