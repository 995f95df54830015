"""The architectures, one file each: a module beside this one is found by itself, by its ARCHITECTURES."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models.architecture import Architecture
from dsconvert.models.towers import TowerModel

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
ARCHITECTURES: dict[str, Architecture] = {
    found.hf_class: found for module in _MODULES for found in module.ARCHITECTURES
}
REFUSED: dict[str, str] = {
    name: why for module in _MODULES for name, why in getattr(module, "REFUSED", {}).items()
}
TOWER_MODELS: tuple[TowerModel, ...] = tuple(
    found for module in _MODULES for found in getattr(module, "TOWERS", ())
)
# A name of GGUF files that several classes share stands for the one of whose own model type it is, or the
# first; see `stored_architecture`.
BY_GGUF_NAME: dict[str, Architecture] = {}
for _found in sorted(ARCHITECTURES.values(), key=lambda found: found.gguf != found.model_type):
    if not _found.mount:
        BY_GGUF_NAME.setdefault(_found.gguf, _found)


def stored_architecture(
    name: object, keys: Mapping[str, Any], tensors: Collection[str]
) -> Architecture | None:
    """The architecture of a GGUF file that names itself `name`: one that claims its keys and tensors, or the
    usual one of the name; None for an unknown name.
    """
    if not isinstance(name, str):
        return None
    for found in ARCHITECTURES.values():
        if found.gguf == name and found.stored_as and not found.mount and found.stored_as(keys, tensors):
            return found
    return BY_GGUF_NAME.get(name)


def tower_model(name: str, raw: Mapping[str, Any]) -> TowerModel | None:
    """What is known of the towers of a class, of whose config.json `raw` is; None for one without towers."""
    found = [model for model in TOWER_MODELS if name in model.tables]
    return found[0] if len(found) == 1 else next((model for model in found if model.claims(raw)), None)


def check_known(name: str, where: object = None) -> None:
    """Raise CheckpointError for a class that is known not to be converted."""
    if name in REFUSED:
        raise CheckpointError(
            f"{name} is not converted",
            where=where,
            why=REFUSED[name],
            hint="What is converted is in the README's table of the family",
        )


def find_architecture(name: str, where: object = None) -> Architecture:
    """The architecture of a class; raises CheckpointError, which names the file `where`, for another one."""
    found = ARCHITECTURES.get(name)
    check_known(name, where)
    if found is None:
        raise CheckpointError(
            f"architecture {name[:80]!r} has no table",
            where=where,
            why=f"tables exist for {', '.join(sorted(ARCHITECTURES))}",
            hint='A model of the same layout converts when "architectures" names one of these classes',
        )
    return found
