"""How kernels are compiled, and where the compiled code is kept: the user's cache folder.

The only module that decides numba's options. Importing it imports numba. The kernels of a
package lie in one folder, whose sources decide when they are compiled anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from dsconvert import __version__
from dsconvert.errors import ConversionError, short


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Tell why the compiler cannot be loaded, which takes 0.5 GB of address space."""
    try:
        yield
    except (OSError, ImportError, MemoryError) as error:
        raise ConversionError(
            "the compiler of the kernels cannot be loaded",
            why=short(error),
            hint="Give the process more memory (`ulimit -v`), or install numba and llvmlite again",
        ) from None


with _loading():
    from llvmlite.binding import get_host_cpu_features, get_host_cpu_name


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Let a package that is not loaded yet look as if it were not installed."""
    hidden = name not in sys.modules
    if hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hidden:
            del sys.modules[name]


# numba loads scipy's linear algebra where that is installed; no kernel uses any.
with _loading(), _without("scipy"):
    import numba
    import numba.np.arraymath

Function = TypeVar("Function", bound=Callable[..., Any])

# Strict float32 as the C reference: no contraction, no reordering; x / 0 is inf and not an exception.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "boundscheck": False}


def inlined(function: Function) -> Function:
    """Compile a helper that kernels call; its code goes into theirs, so nothing is cached for it.

    It cannot be called from Python: the wrappers for that would take a third of the time to compile.
    """
    wrappers = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(forceinline=True, **wrappers, **_OPTIONS)(function)  # type: ignore[no-any-return]


def kernel(function: Function) -> Function:
    """Compile a function that Python calls, at its first call, and keep the code in `cache_folder`.

    numba reads its cache folder when a function is decorated; it is set for that moment only.
    """
    folder = cache_folder(Path(function.__code__.co_filename).parent)
    if folder is None:
        return numba.njit(**_OPTIONS)(function)  # type: ignore[no-any-return]
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder)
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)  # type: ignore[no-any-return]
    finally:
        numba.config.CACHE_DIR = before


@cache
def cache_folder(sources: Path) -> Path | None:
    """The folder of the kernels compiled of `sources`: in the user's cache folder, else a temporary one.

    Its name carries the version and a digest of what the code depends on, since numba looks for changes
    only in the file of the kernel itself. None when nothing can be written anywhere. Several processes may
    share it: numba writes each file under a temporary name and renames it.
    """
    name = f"kernels-{__version__}-{_digest(sources)}"
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if os.path.isabs(home) else Path(os.path.expanduser("~")) / ".cache"
    temporary = Path(tempfile.gettempdir()) / f"dsconvert-{_user()}"
    for folder in (base / "dsconvert" / name, temporary / name):
        if _usable(folder):
            return folder
    return None


def mark(sources: Path, name: str) -> None:
    """Remember that the kernel `name` is in the cache folder, for `marked`."""
    folder = cache_folder(sources)
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / f"{name}.compiled").touch()


def marked(sources: Path, name: str) -> bool:
    """Whether `mark` was called for `name`, by any process since the kernels or the machine changed."""
    folder = cache_folder(sources)
    return folder is not None and (folder / f"{name}.compiled").exists()


def discard(sources: Path) -> None:
    """Delete the compiled kernels; they are made again when they are needed."""
    folder = cache_folder(sources)
    for path in list(folder.rglob("*")) if folder is not None else []:
        if path.is_file():
            path.unlink(missing_ok=True)


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _digest(sources: Path) -> str:
    """A digest of what the compiled code depends on: these sources, numba, Python, the processor."""
    machine = (numba.__version__, sys.version, get_host_cpu_name(), get_host_cpu_features().flatten())
    digest = hashlib.sha256(repr(machine).encode())
    for path in (Path(__file__), *sorted(sources.glob("*.py"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _usable(folder: Path) -> bool:
    """Whether `folder` can be made and written, and is ours with its parent: code is run from it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owners = {folder.stat().st_uid, folder.parent.stat().st_uid}
        with tempfile.TemporaryFile(dir=folder):
            return not hasattr(os, "getuid") or owners == {os.getuid()}
    except OSError:
        return False
