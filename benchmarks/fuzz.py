"""Feeds mutated files of every kind to what opens them, and tells what no stranger's file may bring about.

    python benchmarks/fuzz.py --count 2000 --seed 0
    python benchmarks/fuzz.py --only template --count 200
    python benchmarks/fuzz.py --seed 0 --case 137        # one input again, with its traceback

A fault is: an error other than the ordinary one, an input that takes over 10 seconds, a process over 1 GB,
a file written outside the output's folder, a line on the terminal that it would obey. The exit code is 1
when there is one. Inputs are opened in processes of their own, one a core; some go through the
command line instead.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:1] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "benchmarks")]

from fuzz_inputs import KINDS, Kind, special  # noqa: E402

from dsconvert.errors import ConversionError  # noqa: E402
from dsconvert.machine import usable_cores  # noqa: E402

SECONDS = 10.0
MEMORY = 1 << 30
ASLEEP = 40.0  # a process may wait for a busy machine; for longer it waits for something that never comes
SPECIAL = 0.03  # of the inputs are pipes, folders, devices
COMMANDS = 0.05  # of the inputs go through the command line


@dataclass
class Place:
    """A process's own folders: the input, the output, and what nothing may touch."""

    root: Path
    before: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.input, self.output = self.root / "input", self.root / "output"

    def prepare(self, base: Path) -> None:
        """A copy of the sound input, an empty output, and files around them."""
        for folder in (self.input, self.output):
            shutil.rmtree(folder, ignore_errors=True)
        self.output.mkdir()
        (self.root / "victim").write_text("untouched")
        shutil.copytree(base, self.input)

    def tree(self) -> dict[str, tuple[Any, ...]]:
        """Everything but the output's folder: kind, size and time of change."""
        found: dict[str, tuple[Any, ...]] = {}
        for folder, names, files in os.walk(self.root):
            names[:] = [name for name in names if Path(folder, name) != self.output]
            for name in (*names, *files):
                status = os.lstat(os.path.join(folder, name))
                changed = 0 if os.path.isdir(os.path.join(folder, name)) else status.st_mtime_ns
                found[os.path.join(folder, name)] = (status.st_mode, status.st_size, changed)
        return found


def run_case(seed: int, number: int, only: str, bases: Path, place: Place) -> str:
    """What is wrong with how one input is taken; "" for nothing."""
    rng = random.Random(f"{seed}:{number}")
    kind = KINDS[only or list(KINDS)[number % len(KINDS)]]
    place.prepare(bases / kind.base)
    path = place.input / rng.choice(kind.files)
    if rng.random() < SPECIAL:
        special(rng, path)
    else:
        path.write_bytes(kind.mutate(rng, path.read_bytes()))
    for other in kind.files if kind.alone else ():
        if other != path.name:
            (place.input / other).unlink()
    before = place.tree()
    said = _invoke(kind, bases, place) if rng.random() < COMMANDS else _open(kind, place)
    after = place.tree()
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    return said or (f"wrote outside its folder: {sorted(changed)[:3]}" if changed else "")


def _open(kind: Kind, place: Place) -> str:
    try:
        kind.open(place.input, place.output)
    except ConversionError as error:
        return "" if str(error) else "an error without a text"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return _told(error)
    return ""


def _told(error: BaseException) -> str:
    frames = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[-3:]]
    return f"{type(error).__name__}: {str(error)[:160]!r} at {' > '.join(frames)}"


def _invoke(kind: Kind, bases: Path, place: Place) -> str:
    """Through the command line: the exit code is one of ours, and what is said can be looked at."""
    from click.testing import CliRunner

    from dsconvert.cli import cli

    names = {"input": place.input, "output": place.output, "bases": bases}
    done = CliRunner().invoke(cli, [word.format(**names) for word in kind.command])
    if done.exit_code not in (0, 2, 3):
        return f"exit code {done.exit_code}" + (f", {_told(done.exception)}" if done.exception else "")
    if "stopped by an unexpected" in done.output or "Traceback" in done.output:
        return f"said {done.output[-300:]!r}"
    odd = next((line for line in done.output.split("\n") if not line.isprintable()), "")
    return f"printed {odd[:100]!r}" if odd else ""


def work(pipe: Connection, limit: int, seed: int, only: str, bases: Path, root: Path) -> None:
    """A process that takes numbers of inputs and answers what is wrong with each, and whether it ends itself.

    It does when it has ever had more than `limit` bytes.
    """
    for name in ("home", "cwd", "tmp"):
        (root / name).mkdir(exist_ok=True)
    os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp"), "HF_HUB_OFFLINE": "1"}
    cache = str(bases / "cache")
    os.environ |= {"XDG_CACHE_HOME": cache, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    os.chdir(root / "cwd")
    tempfile.tempdir = None
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        while (number := pipe.recv()) is not None:
            said = run_case(seed, number, only, bases, Place(root))
            largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (
                0 if sys.platform == "darwin" else 10
            )
            ends = largest > limit
            pipe.send((said or (f"took {largest / 1e9:.2f} GB" if ends else ""), ends))
            if ends:
                return


@dataclass
class Worker:
    """A process at work on an input; it is ended and replaced where the input breaks it."""

    asked: tuple[int, str, Path, Path]
    limit: int = 0  # of memory: MEMORY beyond what the process is forked with
    number: int | None = None
    since: float = 0.0
    spent: float = 0.0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin with a new process."""
        self.limit = MEMORY + _resident(os.getpid())
        self.pipe, theirs = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=work, args=(theirs, self.limit, *self.asked), daemon=False)
        self.process.start()
        theirs.close()

    def give(self, number: int | None) -> None:
        """Hand over the next input."""
        self.number, self.since, self.spent = number, time.monotonic(), _processor_time(self.process.pid)
        self.pipe.send(number)

    def over(self) -> str:
        """What the input has used up, or ""."""
        wall = time.monotonic() - self.since
        used = _processor_time(self.process.pid) - self.spent
        if wall > SECONDS and (used > SECONDS or wall > ASLEEP):
            return f"took over {wall:.0f} seconds ({used:.0f} of a processor)"
        if _resident(self.process.pid) > self.limit:
            return f"took over {MEMORY >> 20} MiB"
        return ""

    def end(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _processor_time(pid: int | None) -> float:
    """Seconds that a process and those it has waited for have computed; macOS does not tell: the time."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int | None) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def fuzz(count: int, seed: int, only: str, bases: Path, root: Path, processes: int) -> dict[int, str]:
    """What is wrong, by the number of the input."""
    faults: dict[int, str] = {}
    left = iter(range(count))
    workers = []
    for index in range(min(processes, count)):
        (root / str(index)).mkdir()
        workers.append(Worker((seed, only, bases, root / str(index))))
        workers[-1].give(next(left))
    while busy := [worker for worker in workers if worker.number is not None]:
        ready = wait([worker.pipe for worker in busy], timeout=0.05)
        for worker in busy:
            assert worker.number is not None
            said, broken = "", False
            if worker.pipe in ready:
                try:
                    said, broken = worker.pipe.recv()
                except (EOFError, ConnectionError):
                    said, broken = f"ended the process with {_code(worker)}", True
            elif not (said := worker.over()):
                continue
            else:
                broken = True
            if said:
                faults[worker.number] = said
            if broken:
                worker.end()
                worker.start()
            worker.give(next(left, None))
    for worker in workers:
        worker.process.join(5)
        worker.end()
    return faults


def _code(worker: Worker) -> int | None:
    worker.process.join(5)
    return worker.process.exitcode


def main() -> int:
    """The command; 1 where there is a fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", choices=["", *KINDS], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--case", type=int, help="run this input alone and keep it")
    parser.add_argument("--jobs", type=int, default=usable_cores())
    parser.add_argument("--bases", type=Path, help="folder of the sound inputs; made where it is not there")
    parser.add_argument("--make-bases", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bases = (asked.bases or Path(scratch, "bases")).resolve()
        if asked.make_bases:
            from fuzz_inputs import write_bases

            write_bases(bases)
            return 0
        started = time.monotonic()
        if not bases.exists():  # by another process, so that this one stays small and can be forked
            command = [sys.executable, __file__, "--make-bases", "--bases", str(bases)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        made = time.monotonic()
        if asked.case is not None:
            said = run_case(asked.seed, asked.case, asked.only, bases, Place(Path(tempfile.mkdtemp())))
            print(said or "nothing wrong")
            return int(bool(said))
        root = Path(scratch, "work")
        root.mkdir()
        faults = fuzz(asked.count, asked.seed, asked.only, bases, root, asked.jobs)
    _report(faults, asked, made - started, time.monotonic() - made)
    return int(bool(faults))


def _report(faults: dict[int, str], asked: argparse.Namespace, making: float, running: float) -> None:
    names = list(KINDS)
    for number, said in sorted(faults.items()):
        kind = asked.only or names[number % len(names)]
        again = f"--seed {asked.seed} --case {number}" + (f" --only {asked.only}" if asked.only else "")
        print(f"{kind}: {said}\n    again: python benchmarks/fuzz.py {again}")
    counts = Counter(asked.only or names[number % len(names)] for number in range(asked.count))
    print(
        f"{asked.count} inputs, {len(faults)} faults; {running:.0f} s after {making:.0f} s for sound inputs"
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    sys.exit(main())
