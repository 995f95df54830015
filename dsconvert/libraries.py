"""The libraries that a plain install leaves out: which extra carries each, and what is said where one is
missing."""

from __future__ import annotations

from importlib.util import find_spec

from dsconvert.errors import MissingLibrary

TORCH = ("torch", "transformers")  # run a model by its own classes
# Each extra of pyproject.toml that a command may need, and its libraries.
EXTRAS = {"verify": TORCH, "llamacpp": ("xllamacpp",), "parquet": ("pyarrow",)}


def lacking(*names: str) -> list[str]:
    """Those of these libraries that are not installed; none is imported."""
    return [name for name in names if find_spec(name) is None]


def need(*names: str, what: str, instead: str = "") -> None:
    """Raises MissingLibrary where one of these is not installed.

    `what` is what needs it, and `instead` what can be done without it, behind "or".
    """
    for name in lacking(*names):
        raise missing(name, what, instead)


def missing(name: str, what: str = "this", instead: str = "") -> MissingLibrary:
    """The error that says what to install for `what`, where the library `name` of an extra is missing."""
    extra, brought = next((extra, names) for extra, names in EXTRAS.items() if name in names)
    hint = f"Run `pip install {' '.join(brought)}`, or install dsconvert with its extra [{extra}]"
    return MissingLibrary(
        f"{what} needs {name}, which is not installed", hint=f"{hint}; or {instead}" if instead else hint
    )


def of_import(error: ModuleNotFoundError) -> MissingLibrary | None:
    """The error to show for an import that failed; None where the module is of no extra."""
    name = (error.name or "").partition(".")[0]
    return missing(name) if any(name in names for names in EXTRAS.values()) else None
