"""The only module that prints: progress, tables, verdicts, errors, and all of them as JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dsconvert.errors import ConversionError
from dsconvert.events import BlockRun, Check, Event, Finished, Planned, Step, TensorDone, Warn
from dsconvert.streams import as_json, escaped, write

if TYPE_CHECKING:
    from types import TracebackType

    from dsconvert.proof.result import Report

Result = TypeVar("Result")
PASSED, FAILED, STOPPED = 0, 3, 2
BLOCK_INTERVAL = 5.0
PLAIN_INTERVAL = 2.0  # seconds between progress lines where there is no terminal


def say(text: str = "") -> None:
    """A line of the result, on standard output."""
    write(sys.stdout, text)


def note(text: str) -> None:
    """A line about the work, on standard error."""
    write(sys.stderr, text)


def say_json(value: Any) -> None:
    """A value as one line of JSON on standard output."""
    write(sys.stdout, as_json(value))


def fail(error: ConversionError, as_json: bool = False) -> int:
    """Show an error; returns the exit code of a stopped command."""
    if as_json:
        say_json(error.as_dict())
    else:
        note(f"error: {error}")
    return STOPPED


def show_traceback(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """What `sys.excepthook` does, with an error's text escaped as everything else."""
    import traceback

    for part in traceback.format_exception(kind, error, where):
        for line in part.splitlines():
            note(line)


def size(nbytes: float) -> str:
    """A size as people say it: 1536 -> "1.54 kB"."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if nbytes < 1000 or unit == "TB":
            return f"{nbytes:.3g} {unit}" if nbytes < 1000 else f"{nbytes:.0f} {unit}"
        nbytes /= 1000
    raise AssertionError


def table(
    rows: Iterable[Sequence[object]], heads: Sequence[str], right: frozenset[int] = frozenset()
) -> None:
    """Print rows under `heads`; the columns in `right` are set flush right."""
    cells = [list(heads), *([escaped(str(cell)) for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in cells) for at in range(len(heads))]
    for row in cells:
        line = "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        say(line.rstrip())


def follow(events: Generator[Event, None, Result], quiet: bool = False) -> Result:
    """Show a stream of events while it runs, as `render` does, and return its result."""
    found: list[Result] = []

    def stream() -> Iterator[Event]:
        found.append((yield from events))

    render(stream(), quiet=quiet)
    return found[0]


def render(events: Iterable[Event], *, as_json: bool = False, quiet: bool = False, plan: bool = False) -> int:
    """Show a stream of events while it runs and return the exit code: 0, or 3 when a check failed.

    `quiet` keeps warnings and failed checks only; `plan` shows the table of every tensor.
    """
    failed = 0
    with _progress(as_json or quiet) as progress:
        shown = _Shown(progress, quiet, plan)
        for event in events:
            failed += isinstance(event, Check) and not event.passed
            if as_json:
                say_json(event.as_dict())
            else:
                shown.show(event)
    return FAILED if failed else PASSED


@dataclass
class _Shown:
    """How each kind of event looks to a person."""

    progress: Callable[[int, int], None]
    quiet: bool
    plan: bool
    last: float = field(default_factory=time.monotonic)

    def show(self, event: Event) -> None:
        match event:
            case Warn(text):
                note(f"warning: {text}")
            case Check(name, passed, detail) if not (self.quiet and passed):
                (say if passed else note)(f"{'ok  ' if passed else 'FAIL'}  {name:<16} {detail}")
            case _ if self.quiet:
                pass
            case Planned():
                show_plan(event, self.plan)
            case Step(text):
                note(text)
            case TensorDone():
                self.progress(event.done, event.total)
            case BlockRun(index, layers):
                self.show_block(index, layers)
            case Finished(path, nbytes, seconds):
                say(f"wrote {path} ({size(nbytes)}) in {seconds:.1f} s")
            case _:
                pass

    def show_block(self, index: int, layers: int) -> None:
        """A line now and then while blocks run."""
        now = time.monotonic()
        if now - self.last >= BLOCK_INTERVAL:
            self.last = now
            note(f"block {index + 1} of {layers}")


def show_proof(report: Report, quiet: bool = False) -> None:
    """The figures of a verified output under llama.cpp's names, and the verdict with its reasons."""
    from dsconvert.report.rows import ENGINE_COLUMNS, engine_rows, figure_rows

    figures = report.comparison.figures
    if figures is not None and not quiet:
        say()
        heads = ("figure", "value", "error", "limit")
        table(figure_rows(figures, report.limits), heads, frozenset({1, 2}))
        say()
    if figures is not None and report.engine is not None and not quiet:
        table(engine_rows(figures, report.engine), ENGINE_COLUMNS, frozenset(range(1, len(ENGINE_COLUMNS))))
        say()
    said = report.verdict
    if said.passed and not quiet:
        say(f"PASS  {report.title}")
    if not said.passed:
        note(f"FAIL  {report.title}: {'; '.join(said.reasons)}")


def show_plan(event: Planned, every_tensor: bool) -> None:
    """The table of a planned output: per type the count and exact bytes, on request per tensor."""
    if every_tensor:
        table(
            (
                (t.name, "x".join(map(str, t.shape)), t.source_type, t.type, f"{t.nbytes:,}")
                for t in event.tensors
            ),
            ("tensor", "shape", "from", "to", "bytes"),
            frozenset({4}),
        )
        say()
    types: dict[str, list[int]] = {}
    for tensor in event.tensors:
        types.setdefault(tensor.type, []).append(tensor.nbytes)
    if every_tensor:
        table(
            ((name, len(sizes), f"{sum(sizes):,}") for name, sizes in types.items()),
            ("type", "tensors", "bytes"),
            frozenset({1, 2}),
        )
    summary = ", ".join(f"{len(sizes)} {name}" for name, sizes in types.items())
    total = sum(event.nbytes)
    files = (
        event.outputs[0]
        if len(event.outputs) == 1
        else f"{event.outputs[0]} and {len(event.outputs) - 1} more"
    )
    pre = f", pre-tokenizer {event.pre_tokenizer}" if event.pre_tokenizer else ""
    sizes = f"{size(event.source_nbytes)} -> {size(total)} ({total:,} bytes)"
    say(f"{event.quant}: {sizes}, {summary}{pre} -> {files}")


@contextmanager
def _progress(silent: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with rate and time left on a terminal, a line now and then elsewhere."""
    if silent:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        with _bar() as update:
            yield update
    else:
        yield _lines()


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("quantizing"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=done < total)


def _lines() -> Callable[[int, int], None]:
    started = last = 0.0

    def update(done: int, total: int) -> None:
        nonlocal started, last
        now = time.monotonic()
        if not started:
            started = last = now
        elif now - last >= PLAIN_INTERVAL and total:
            last = now
            rate = done / (now - started)
            left = f"{(total - done) / rate:.0f} s left"
            note(f"{100 * done // total} %, {size(done)} of {size(total)}, {size(rate)}/s, {left}")

    return update


def show_mapping(values: Mapping[str, object], width: int = 100) -> None:
    """Keys and values one a line, long values cut."""
    for key, value in values.items():
        text = repr(value) if isinstance(value, str) else str(value)
        say(f"  {key:<44} {_cut(text, width)}")


def visible(text: str) -> str:
    """The text with everything but printable ASCII escaped, as a regex may be typed."""
    return "".join(char if " " <= char <= "~" else ascii(char)[1:-1] for char in text)


def _cut(text: str, width: int = 90) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def show_steps(spec: Mapping[str, Any], runtime: str | None) -> None:
    """A pre-tokenizer's regex steps."""
    say(f"pre-tokenizer {runtime or ''}, {spec['flavor']}, sha256 {spec['sha256']}".replace(" ,", ","))
    rows = ((step["type"], step["behavior"], _cut(visible(str(step["regex"])))) for step in spec["steps"])
    table(rows, ("step", "behavior", "regex"))


def show_tokenizer(found: Mapping[str, Any]) -> None:
    """What `tokenizer` found: the steps, encoded texts, a comparison by class with examples."""
    say(f"{found['file']}: {found['kind']}")
    if "pre_tokenizer" in found:
        show_steps(found["pre_tokenizer"], found["runtime"])
    for encoded in found["encoded"]:
        say()
        say(visible(encoded["text"]))
        table(
            zip(encoded["ids"], map(visible, encoded["tokens"]), strict=True), ("id", "token"), frozenset({0})
        )
    compared = found.get("comparison")
    if compared:
        say()
        say(f"{compared['different']} of {compared['texts']:,} texts give other ids")
        table(compared["classes"].items(), ("class", "texts"), frozenset({1}))
        for kind, text, first, second in compared["examples"]:
            say(f"  {kind}: {visible(text)!r}  {list(first)}  {list(second)}")
