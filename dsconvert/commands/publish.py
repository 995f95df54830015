"""--card and --push-to: what a conversion has made, with a model card of what its proof found."""

from __future__ import annotations

import hashlib
import os
import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dsconvert.commands.given import refuse
from dsconvert.commands.shared_options import apply
from dsconvert.errors import OutputError
from dsconvert.events import Check, Event, Finished, Planned, Proven, Step, Warn

if TYPE_CHECKING:
    from dsconvert.report.card import Entry

Command = TypeVar("Command", bound=Callable[..., Any])
README = "README.md"
OPTIONS = (
    click.option(
        "--card",
        is_flag=True,
        help="Write a model card with what was measured: README.md beside the output, or in it.",
    ),
    click.option(
        "--push-to",
        metavar="ORG/NAME",
        help="Upload what passed its proof, with a model card, to a repository of the hub, made if need be.",
    ),
    click.option("--private", is_flag=True, help="Make the repository of --push-to a private one."),
)


def publish_options(command: Command) -> Callable[..., Any]:
    """Add the options to a command, which receives a Publish as `publish`."""

    @wraps(command)
    def with_publish(*, card: bool, push_to: str | None, private: bool, effort: str, **others: Any) -> Any:
        hint = "Leave it out, or --effort off"
        if effort == "off":
            refuse("card", "push_to", where="with --effort off, which measures nothing", hint=hint)
        if others.get("dry_run"):
            refuse("card", "push_to", where="with --dry-run", hint="Leave one of them out")
        if push_to is None:
            refuse("private", where="without --push-to", hint="Leave it out")
        publish = Publish(card, push_to, private, typed(), others["out"])
        return command(publish=publish, effort=effort, **others)

    return apply(with_publish, OPTIONS)


def typed() -> str:
    """The command as its user typed it."""
    from dsconvert.commands.run import TYPED

    context = click.get_current_context()
    return shlex.join(["dsconvert", context.info_name or "", *context.meta[TYPED]])


@dataclass
class Made:
    """What a conversion has made so far: complete files and folders, and of each proof the checks."""

    places: list[Path] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    failed: bool = False

    def tell_rest(self) -> None:
        """Checks of what was made beside the last output, such as its projector, are told with its own."""
        if self.entries and self.checks:
            last = self.entries[-1]
            rest = tuple((check.name, check.passed, check.detail) for check in self.checks)
            self.entries[-1] = replace(
                last, checks=(*last.checks, *rest), passed=last.passed and not self.failed
            )


@dataclass(frozen=True)
class Publish:
    """Whether to write a card, and where to upload to; `command` is what was typed, `out` its --out."""

    card: bool
    push_to: str | None
    private: bool
    command: str
    out: Path | None = None

    def after(self, events: Iterator[Event]) -> Iterator[Event]:
        """The events of a conversion, and then those of its publication.

        What can be refused is refused before the conversion begins, or before it writes. Raises UsageError,
        OutputError.
        """
        if not self.card and self.push_to is None:
            yield from events
            return
        if self.out is not None:
            self._check_card(self.out)  # measuring comes before a plan, and takes hours
        if self.push_to is not None:
            yield Step(f"asking the hub whether {self.push_to} may be written")
            theirs = self._before_pushing(self.push_to)
        made = Made()
        for event in events:
            match event:
                case Planned():
                    self._check_card(Path(event.outputs[0]))
                case Finished():
                    made.places.append(Path(event.path))
                case Check():
                    made.checks.append(event)
                    made.failed |= not event.passed
                case Proven():
                    made.entries.append(entry_of(event, made, self.command))
                    made.checks.clear()
            yield event
        made.tell_rest()
        if self.card:
            yield self._write(made)
        if self.push_to is not None and made.failed:
            yield Warn(f"nothing is uploaded to {self.push_to}: a check failed")
        elif self.push_to is not None:
            yield from self._push(made, theirs)

    def _before_pushing(self, name: str) -> str | None:
        from dsconvert.checkpoints.hub_upload import card_of, check_push

        check_push(name)
        return card_of(name)

    def _check_card(self, out: Path) -> None:
        from dsconvert.report.card import is_card

        path = card_path(out)
        if self.card and os.path.lexists(path) and not is_card(path):
            raise OutputError(
                "is not a card that dsconvert made, and is left as it is",
                where=path,
                hint="Move it, give --out another folder, or leave --card out",
            )

    def _write(self, made: Made) -> Finished:
        """Write the card, which keeps what an earlier one of ours tells of other outputs beside it."""
        from dsconvert.checkpoints.output_files import write_file
        from dsconvert.reading import read_text
        from dsconvert.report.card import LIMIT, entries_of, merged, render

        self._check_card(made.places[0])
        path, started = card_path(made.places[0]), time.monotonic()
        before = entries_of(read_text(path, LIMIT)) if path.exists() else None
        text = render(merged(before or (), made.entries)).encode()
        write_file(path, text, replace=True)
        return Finished(str(path), len(text), time.monotonic() - started)

    def _push(self, made: Made, theirs: str | None) -> Iterator[Event]:
        """Upload every file that was made, and the card unless README.md there is somebody else's."""
        from dsconvert.checkpoints.hub_upload import push
        from dsconvert.report.card import entries_of, merged, render

        assert self.push_to is not None
        files: dict[str, Path | bytes] = dict(uploaded(made.places))
        before = () if theirs is None else entries_of(theirs)
        if before is None:
            files.pop(README, None)
            yield Warn(f"README.md of {self.push_to} is not a card that dsconvert made, and stays as it is")
        else:
            files[README] = render(merged(before, made.entries)).encode()
        names = ", ".join(entry.quant for entry in made.entries)
        started = time.monotonic()
        yield Step(f"uploading {len(files)} files to {self.push_to}")
        version = made.entries[0].provenance.get("versions", "dsconvert").partition(",")[0]
        url = push(self.push_to, files, f"{names} by {version}", self.private, made.places)
        nbytes = sum(len(f) if isinstance(f, bytes) else f.stat().st_size for f in files.values())
        yield Finished(url, nbytes, time.monotonic() - started)


def card_path(out: Path) -> Path:
    """Where the card of an output is: in a folder, or beside a file."""
    return (out.parent if out.suffix == ".gguf" else out) / README


def uploaded(places: list[Path]) -> Iterator[tuple[str, Path]]:
    """The files of outputs by the names that they get in a repository."""
    for place in places:
        if place.is_file():
            yield place.name, place
        for path in sorted(place.rglob("*")) if place.is_dir() else ():
            if path.is_file():
                yield path.relative_to(place).as_posix(), path


def entry_of(event: Proven, made: Made, command: str) -> Entry:
    """What a card says of an output whose proof has just ended."""
    from converters.gguf.metadata import model_card
    from dsconvert.report.card import Entry

    stated = model_card(Path(event.folder)).get("license")
    told = {name: event.provenance[name] for name in ("reference", "text", "arithmetic", "versions")}
    return Entry(
        name=Path(event.path).name, kind=event.kind, quant=event.quant, nbytes=event.nbytes, bits=event.bits,
        passed=event.passed, model=event.model, base=event.base, commit=event.commit, command=command,
        license=stated if isinstance(stated, str) else "", figures=event.figures,
        checks=tuple((check.name, check.passed, check.detail) for check in made.checks),
        files=dict(weights(Path(event.path), made.places)), provenance=told,
    )  # fmt: skip


def weights(output: Path, places: list[Path]) -> Iterator[tuple[str, tuple[int, str]]]:
    """Size and sha256 of the files that hold an output's weights; of a split file, of all its parts."""
    stem = output.stem.partition("-00001-of-")[0]
    parts = [path for path in places if path.is_file() and path.stem.partition("-0000")[0] == stem]
    for path in sorted(output.glob("*.safetensors")) if output.is_dir() else parts:
        with path.open("rb") as file:
            yield path.name, (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
