"""The errors that a user can meet.

ConversionError            anything that stops a command; exit code 2
├── UsageError             an option or an argument does not make sense
├── MissingLibrary         a library that a plain install leaves out is needed
├── CheckpointError        a source file is missing, damaged or contradicts itself
├── PlanError              the checkpoint and the architecture table do not match
├── TokenizerError         the tokenizer cannot be carried so that ids stay the same
├── QuantizationError      a weight has no faithful value in the asked type
└── OutputError            the output cannot be written
"""

from __future__ import annotations

from typing import Any


class ConversionError(Exception):
    """What went wrong, where, why, and the next command to try.

    `what` is one sentence without a final full stop; `where` a file or tensor; `why` the evidence;
    `hint` what to do next. `str()` returns them as one paragraph.

    >>> str(ConversionError("is not a file", where="a.gguf", why="It is a folder", hint="Name a file in it"))
    'a.gguf: is not a file. It is a folder. Name a file in it.'
    """

    def __init__(self, what: str, *, where: object = "", why: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.why, self.hint = what, str(where), why, hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        parts = [text, self.why, self.hint]
        paragraph = ". ".join(part.rstrip(".") for part in parts if part) + "."
        return " ".join(paragraph.split())  # a file's name may hold a line break

    def as_dict(self) -> dict[str, Any]:
        """The error in the JSON form of events."""
        fields = {"what": self.what, "where": self.where, "why": self.why, "hint": self.hint}
        return {"event": "error", "kind": type(self).__name__, **fields}


class UsageError(ConversionError):
    """An option or an argument does not make sense."""


class MissingLibrary(ConversionError):
    """A library that a plain install leaves out is needed."""


class CheckpointError(ConversionError):
    """A source file is missing, damaged or contradicts itself."""


class PlanError(ConversionError):
    """The checkpoint and the architecture table do not match."""


class TokenizerError(ConversionError):
    """The tokenizer cannot be carried so that ids stay the same."""


class QuantizationError(ConversionError):
    """A weight has no faithful value in the asked type."""


class OutputError(ConversionError):
    """The output cannot be written."""


def short(error: BaseException) -> str:
    """The first line of an exception's text, 200 characters at the most."""
    lines = str(error).splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def quoted(name: object) -> str:
    """A name from a file as it can stand in a message: escaped, 120 characters at the most."""
    return repr(str(name)[:120])
