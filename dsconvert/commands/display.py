"""How a command shows what it does and finds: as text, or as JSON on standard output or in a file."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dsconvert import console
from dsconvert.errors import ConversionError
from dsconvert.streams import as_json

if TYPE_CHECKING:
    from dsconvert.events import Event

Result = TypeVar("Result")
STANDARD_OUTPUT = "-"


@dataclass(frozen=True)
class Display:
    """Where the events and results of a command go.

    With `json` they are written to standard output as JSON, one object a line, in place of text. With
    `json_file` the same lines are collected in `lines`, beside the text, and saved at the end. With `quiet`
    the text is warnings and failures only.
    """

    json: bool = False
    json_file: Path | None = None
    quiet: bool = False
    lines: list[str] = field(default_factory=list, repr=False)

    def events(self, events: Iterable[Event], *, plan: bool = False) -> int:
        """Show a stream of events while it runs; returns the exit code: 0, or 3 when a check failed."""
        return console.render(self._recorded(events), as_json=self.json, quiet=self.quiet, plan=plan)

    def follow(self, events: Generator[Event, None, Result]) -> Result:
        """Show a stream of events as text while it runs; returns its result, which `result` shows."""
        return console.follow(events, self.quiet or self.json)

    def result(self, value: Mapping[str, Any], show: Callable[[], None], *, passed: bool = True) -> None:
        """Show a result: `value` as JSON, or by `show` as text, with `quiet` only what has not passed."""
        self._record(value)
        if self.json:
            console.say_json(value)
        elif not (self.quiet and passed):
            show()

    def text(self, line: str) -> None:
        """Show a line of text; nothing with `json` or `quiet`."""
        if not (self.json or self.quiet):
            console.say(line)

    def fail(self, error: ConversionError) -> int:
        """Show an error and save it with the lines before it; returns the exit code of a stopped command."""
        self._record(error.as_dict())
        code = console.fail(error, self.json)
        try:
            self.save()
        except ConversionError as second:
            console.fail(second)
        return code

    def check(self, *outputs: Path | None) -> None:
        """See that the JSON file can be written and is none of `outputs`; raises OutputError."""
        if self.json_file is not None:
            from dsconvert.checkpoints.output_plan import check_distinct
            from dsconvert.proof.result import check_targets

            check_distinct([self.json_file, *(path for path in outputs if path is not None)])
            check_targets(None, self.json_file)

    def save(self) -> None:
        """Write the JSON file, if one is wanted and there is a line; raises OutputError."""
        if self.json_file is not None and self.lines:
            from dsconvert.proof.result import save_json

            save_json(self.json_file, "".join(self.lines))

    def _record(self, value: Mapping[str, Any]) -> None:
        if self.json_file is not None:
            self.lines.append(as_json(value) + "\n")

    def _recorded(self, events: Iterable[Event]) -> Iterator[Event]:
        for event in events:
            self._record(event.as_dict())
            yield event
