"""Set up and try, or test, a fresh clone; needs nothing but Python 3.11 or newer.

    python3 dev.py sample    install into .venv, convert the embedded sample to q4_0, prove the result
    python3 dev.py test      install into .venv if need be, lint, type-check and run the tests

Further arguments of `test` go to pytest.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "installed"
BIN = VENV / ("Scripts" if sys.platform == "win32" else "bin")


def run(*command: str | Path) -> None:
    """Run a command in the repository; leave with its exit code when it fails."""
    code = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)


def install() -> None:
    """Make .venv and install the package with its test tools, unless that has been done for these files."""
    if sys.version_info < (3, 11):
        sys.exit(f"dsconvert needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    wanted = hashlib.sha256(
        b"".join((ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
    )
    if STAMP.is_file() and STAMP.read_text() == wanted.hexdigest():
        return
    print("Setting up .venv (once; about 2 GB of disk with torch)", flush=True)
    venv.create(VENV, with_pip=True, clear=STAMP.exists())
    run(BIN / "python", "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", ".[dev]")
    STAMP.write_text(wanted.hexdigest())


def sample() -> None:
    """Convert the embedded sample as a user would."""
    command = [
        "gguf",
        "sample:",
        "--outfile",
        "sample-q4_0.gguf",
        "--quant",
        "q4_0",
        "--verify",
        "full",
        "--force",
    ]
    print("$ dsconvert " + " ".join(command), flush=True)
    run(BIN / "dsconvert", *command)


def test(arguments: list[str]) -> None:
    """Lint, formatting, types, tests."""
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")
    run(BIN / "mypy")
    run(BIN / "python", "-m", "pytest", *arguments)


def main() -> None:
    match sys.argv[1:]:
        case ["sample"]:
            install()
            sample()
        case ["test", *arguments]:
            install()
            test(arguments)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
