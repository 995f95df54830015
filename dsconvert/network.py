"""Requests to the Hugging Face hub beside its client's own: one answer at a time, and how long to be patient.

The client brings the HTTP library along, and its version decides which: httpx's kind, or requests.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

# Where the client's network errors come from.
TRANSPORTS = ("httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")
TEMPORARY = (408, 429, 500, 502, 503, 504)  # answers that say: later
PIECE = 64 << 10
REST = 64 << 10  # bytes of an unwanted answer that are read, so that its connection can be used again


class Lost(Exception):
    """There was no answer, it broke off, or it said: later; `after` seconds, where it said when.

    `slow` when bytes came, and too few.
    """

    def __init__(self, why: str, after: float | None = None, slow: bool = False) -> None:
        super().__init__(why)
        self.after, self.slow = after, slow


@dataclass(frozen=True)
class Patience:
    """How long to wait: seconds without a byte, tries without progress, the first pause, which doubles.

    `longest` is the longest pause that a server may ask for, in seconds. An answer that has brought less than
    `slowest` bytes a second after `window` seconds is given up.
    """

    silence: float = 10.0
    tries: int = 6
    pause: float = 0.5
    longest: float = 300.0
    slowest: float = 1000.0
    window: float = 30.0

    def pause_before(self, attempt: int, after: float | None) -> float:
        """Seconds to wait after so many tries: what the server said, else twice as long each time."""
        return self.pause * 2 ** (attempt - 1) if after is None else after


@dataclass(frozen=True)
class Answer:
    """An answer to a GET, no redirect followed: `headers` by lower-case names, the body in `pieces`."""

    url: str
    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]


@contextmanager
def answer(url: str, headers: Mapping[str, str], silence: float) -> Iterator[Answer]:
    """The answer to a GET; raises Lost for what the network does to it, also while it is read."""
    try:
        response, found = _asked(url, dict(headers), silence)
    except Exception as error:  # the libraries have no common class
        raise _lost(error) from None
    try:
        yield found
    except Exception as error:
        raise _lost(error) from None
    finally:
        response.close()


def _asked(url: str, headers: dict[str, str], silence: float) -> tuple[Any, Answer]:
    import huggingface_hub.utils as client

    session: Any = getattr(client, "get_session")()  # noqa: B009 - its types leave it out
    if hasattr(session, "build_request"):
        request = session.build_request("GET", url, headers=headers, timeout=silence)
        response = session.send(request, stream=True, follow_redirects=False)
        pieces = response.iter_raw()  # of no fixed size: what came before a break would be held back
    else:
        response = session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=silence)
        pieces = response.raw.stream(PIECE, decode_content=False)
    named = {name.lower(): value for name, value in response.headers.items()}
    return response, Answer(url, response.status_code, named, pieces)


def _lost(error: Exception) -> Exception:
    """The library's error as Lost; any other as it is."""
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in TRANSPORTS:
        lines = str(error).splitlines()
        return Lost((lines[0] if lines else type(error).__name__)[:200])
    return error


def finish(found: Answer) -> None:
    """Read the rest of a short answer that is not wanted: its connection is kept."""
    left = REST
    for piece in found.pieces:
        left -= len(piece)
        if left < 0:
            return


def asked_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: Retry-After, as seconds or a date, or the hub's RateLimit."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text)
    if text:
        try:
            return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
        except (TypeError, ValueError):
            return None
    for part in headers.get("ratelimit", "").split(";"):  # "api";r=0;t=55
        name, _, value = part.strip().partition("=")
        if name == "t" and value.isdecimal():
            return float(value)
    return None


def host(url: str) -> str:
    """The host and port of a URL, as it can be shown: a mirror's may hold a user and a password."""
    return urlsplit(url).netloc.rpartition("@")[2]


def origin(url: str) -> tuple[str, str]:
    """Scheme, host and port of a URL: a token is sent to the origin that it is for, and nowhere else."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)
    return parts.scheme, f"{(parts.hostname or '').lower()}:{port}"
