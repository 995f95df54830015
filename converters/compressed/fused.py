"""Linears that runtimes make one of: they want one scheme, of nvfp4 one global scale, for all of these."""

from __future__ import annotations

from collections.abc import Collection, Iterable

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"))
EXPERTS = ".experts."


def fused_with(name: str, among: Collection[str]) -> tuple[str, ...]:
    """The weights that are multiplied by together with this one, itself too, as far as they are `among`."""
    stem, dot, last = name.removesuffix(".weight").rpartition(".")
    members = next((group for group in FUSED if last in group), (last,))
    return tuple(one for member in members if (one := f"{stem}{dot}{member}.weight") in among)


def of_one_scheme(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The weights that must have one scheme, by the first of each: fused ones, all experts of a layer."""
    found: dict[str, list[str]] = {}
    for name in (every := dict.fromkeys(names)):
        stem, experts, _ = name.partition(EXPERTS)
        found.setdefault(stem if experts else fused_with(name, every)[0], []).append(name)
    return {members[0]: tuple(members) for members in found.values()}
