"""The process that renders chat templates: started by `rendering`, never imported by the tool.

A template is a program by strangers. Here it may take MEMORY bytes of address space and SECONDS of processor
time, compiling included; over that the kernel stops it, and the tool goes on. It imports jinja2 and nothing
heavy. On its input: the paths to import from, then requests {"template", "values"}; on its output, once when
it is ready and for each request, {"text"} or {"error": [kind, message]}. All are JSON after their length, 8
bytes big-endian.
"""

from __future__ import annotations

import contextlib
import json
import resource
import struct
import sys
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

MEMORY = 512 << 20
SECONDS = 3
TEXT_LIMIT = 32 << 20  # characters of a rendered conversation
LENGTH = struct.Struct(">Q")


def main() -> None:
    """Answer requests until the input ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    sys.path[:] = _read(source) or []
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, 0)
    with contextlib.suppress(Exception):  # every request will report it
        _renderer()
    _limit(resource.RLIMIT_AS, MEMORY)
    _limit(resource.RLIMIT_DATA, MEMORY)
    _write(target, {"text": "ready"})
    while (request := _read(source)) is not None:
        try:
            _limit_processor()
            answer = {"text": _renderer()(request["template"], request["values"])}
        except Exception as error:  # a template may raise anything
            answer = {"error": [type(error).__name__, _text(error)]}
        _write(target, answer)


def _text(error: Exception) -> str:
    try:
        return str(error)[:1000]
    except Exception:  # the text may be too big to make
        return ""


def _limit(kind: int, value: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # macOS knows not every limit
        resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))


def _limit_processor() -> None:
    """Let the next request have SECONDS; the limit counts whole seconds since the process began."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + SECONDS)


def _read(source: BinaryIO) -> Any:
    head = source.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return json.loads(source.read(LENGTH.unpack(head)[0]))


def _write(target: BinaryIO, answer: Any) -> None:
    data = json.dumps(answer).encode()
    target.write(LENGTH.pack(len(data)) + data)
    target.flush()


@lru_cache(maxsize=1)
def _renderer() -> Any:
    """The function (template, values) -> text, as transformers' apply_chat_template renders."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks what an assistant said, for training; what it encloses is rendered."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_enclosed"), [], [], body).set_lineno(line)

        def _enclosed(self, caller: Any) -> Any:
            return caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        x: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.optimized = False  # folding constants would run a template's sums while it is compiled
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    compiled = lru_cache(maxsize=4)(environment.from_string)

    def render(template: str, values: dict[str, Any]) -> str:
        size, parts = 0, []
        for part in compiled(template).generate(**values):
            size += len(part)
            if size > TEXT_LIMIT:
                raise ValueError(f"gives more than {TEXT_LIMIT >> 20} million characters")
            parts.append(part)
        return "".join(parts)

    return render


if __name__ == "__main__":
    main()
