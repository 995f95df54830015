"""The architectures, one file each: a module beside this one is found by itself, by its ARCHITECTURES."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from dsconvert.errors import CheckpointError
from dsconvert.models.architecture import Architecture

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
ARCHITECTURES: dict[str, Architecture] = {
    found.hf_class: found for module in _MODULES for found in module.ARCHITECTURES
}
# A name of GGUF files that several classes share stands for the one of whose own model type it is.
BY_GGUF_NAME: dict[str, Architecture] = {
    found.gguf: found for found in ARCHITECTURES.values() if found.gguf == found.model_type
}


def find_architecture(name: str, where: object = None) -> Architecture:
    """The architecture of a class; raises CheckpointError, which names the file `where`, for another one."""
    found = ARCHITECTURES.get(name)
    if found is None:
        raise CheckpointError(
            f"architecture {name[:80]!r} has no table",
            where=where,
            why=f"tables exist for {', '.join(sorted(ARCHITECTURES))}",
            hint='A model of the same layout converts when "architectures" names one of these classes',
        )
    return found
