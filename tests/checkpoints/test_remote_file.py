"""Files read by ranges from a server that fails in every way: what is given up, what is read anyway."""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, ClassVar, cast

import numpy as np
import pytest
from hub_server import COMMIT, Fault, Hub, serving, sha256

from dsconvert.checkpoints.read_ahead import AHEAD, BLOCK, FEW, ReadAhead
from dsconvert.checkpoints.remote_file import RemoteFile
from dsconvert.errors import CheckpointError
from dsconvert.network import Lost, Patience, asked_pause, origin

NAME, WHERE = "model.safetensors", "owner/name/model.safetensors"
BODY = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8).tobytes()
HASTE = Patience(silence=0.3, tries=3, pause=0.01, longest=5.0, slowest=1e6, window=0.2)
RANGE = (1_000_000, 2_000_000)


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ExitStack() as entered:
        yield entered


def file_of(hub: Hub, **changes: Any) -> RemoteFile:
    url = f"{hub.url}/owner/name/resolve/{COMMIT}/{NAME}"
    headers = {"Authorization": "Bearer secret"}
    fields = {"size": len(BODY), "oid": sha256(BODY), "headers": headers, "patience": HASTE, **changes}
    return RemoteFile(WHERE, url, COMMIT, **fields)


def served(stack: ExitStack, *faults: Fault | None, **settings: Any) -> Hub:
    settings = {"faults": {NAME: list(faults)}, **settings}
    hub = Hub({"owner/name": {NAME: BODY}}, **settings)
    return stack.enter_context(serving(hub))


def stored_apart(stack: ExitStack, *faults: Fault | None, **settings: Any) -> tuple[Hub, Hub]:
    """The hub, and the host that it sends to for the content."""
    storage = served(stack, *faults)
    return served(stack, storage=storage.url, token="secret", **settings), storage


def refusal(file: RemoteFile) -> str:
    with pytest.raises(CheckpointError) as caught:
        file.read(*RANGE)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------


def test_ranges_come_over_one_connection_and_are_counted(stack: ExitStack) -> None:
    hub = served(stack)
    file = file_of(hub)
    for start, stop in ((0, 1), RANGE, (2_999_999, 3_000_000), (5, 5), (0, 3_000_000)):
        assert file.read(start, stop) == BODY[start:stop]
    assert file.traffic.nbytes == hub.sent == 1 + 1_000_000 + 1 + 3_000_000
    assert (file.traffic.answers, file.traffic.again, len(hub.peers)) == (4, 0, 1)


@pytest.mark.parametrize("cut", [0, 1, 600_000, 999_999])
def test_a_lost_connection_goes_on_in_the_middle(stack: ExitStack, cut: int) -> None:
    hub = served(stack, Fault(cut=cut))
    file = file_of(hub)
    assert file.read(*RANGE) == BODY[slice(*RANGE)]
    assert [asked for _, _, asked in hub.asked] == [
        "bytes=1000000-1999999",
        f"bytes={1_000_000 + cut}-1999999",
    ]
    assert file.traffic.again == 1
    assert file.traffic.nbytes == hub.sent == 1_000_000


def test_many_cuts_with_progress_are_no_end(stack: ExitStack) -> None:
    hub = served(stack, *[Fault(cut=100_000)] * (3 * HASTE.tries))
    assert file_of(hub).read(*RANGE) == BODY[slice(*RANGE)]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(stack: ExitStack, status: int) -> None:
    hub = served(stack, Fault(status=status), Fault(status=status))
    assert file_of(hub).read(*RANGE) == BODY[slice(*RANGE)]
    assert len(hub.asked) == 3


def test_what_a_server_asks_to_wait_is_waited(stack: ExitStack) -> None:
    class Waits(threading.Event):
        waited: ClassVar[list[float | None]] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.waited.append(timeout)
            return False

    busy = [Fault(status=429, headers={"Retry-After": "3"}), Fault(status=503)]
    assert file_of(served(stack, *busy), ended=Waits()).read(*RANGE) == BODY[slice(*RANGE)]
    assert Waits.waited == [3.0, 2 * HASTE.pause]


def test_an_answer_with_fewer_bytes_than_asked_for_is_taken(stack: ExitStack) -> None:
    half = Fault(
        cut=500_000, headers={"Content-Range": "bytes 1000000-1499999/3000000", "Content-Length": "500000"}
    )
    hub = served(stack, half)
    assert file_of(hub).read(*RANGE) == BODY[slice(*RANGE)]
    assert hub.asked[1][2] == "bytes=1500000-1999999"


def test_the_whole_file_may_come_without_a_range(stack: ExitStack) -> None:
    assert file_of(served(stack, Fault(whole=True))).read(0, len(BODY)) == BODY


# --- another host ----------------------------------------------------------------------------------------


def test_the_token_stays_with_the_hub(stack: ExitStack) -> None:
    hub, storage = stored_apart(stack, Fault(cut=10), None)
    file = file_of(hub)
    for _ in range(3):
        assert file.read(*RANGE) == BODY[slice(*RANGE)]
    assert hub.tokens == ["Bearer secret"], "the address that it gives is used again"
    assert storage.tokens == [""] * 4


def test_an_address_that_has_run_out_is_asked_for_anew(stack: ExitStack) -> None:
    hub, storage = stored_apart(stack, None, Fault(status=403))
    file = file_of(hub)
    for _ in range(2):
        assert file.read(*RANGE) == BODY[slice(*RANGE)]
    assert (len(hub.asked), len(storage.asked)) == (2, 3)


def test_an_address_that_never_holds_is_given_up(stack: ExitStack) -> None:
    hub, _ = stored_apart(stack, *[Fault(status=403)] * 9)
    assert "answers with status 403; tried 3 times" in refusal(file_of(hub))


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_a_redirect_leads_to_http_alone(stack: ExitStack, target: str) -> None:
    hub, _ = stored_apart(stack, faults={f"{NAME}:hub": [Fault(headers={"Location": target})]})
    assert "does not serve the bytes" in refusal(file_of(hub))


def test_a_redirect_from_https_to_http_is_refused() -> None:
    from dsconvert.network import Answer

    file = RemoteFile(WHERE, "https://hub.example/x", COMMIT, 1)
    answer = Answer("https://hub.example/x", 302, {"location": "http://other.example/x"}, iter(()))
    with pytest.raises(CheckpointError, match="which is not https"):
        file._target(answer)


def test_redirects_in_a_circle_end(stack: ExitStack) -> None:
    hub = served(stack, storage="http://127.0.0.1:1")
    hub.storage = hub.url
    assert "5 times" in refusal(file_of(hub))


# --- what is given up ------------------------------------------------------------------------------------

SAID = {
    "cut": ([Fault(cut=0)] * 9, "cannot be read over the network"),
    "silent": ([Fault(cut=0, pause=1.0)] * 3, "tried 3 times"),
    "slow": ([Fault(rate=100_000)] * 3, "is read too slowly"),
    "busy": ([Fault(status=503)] * 9, "status 503; tried 3 times"),
    "busy long": ([Fault(status=429, headers={"Retry-After": "3600"})], "asks to wait 3,600 s; tried once"),
    "whole": ([Fault(whole=True)], "status 200 in place of 206"),
    "no range": ([Fault(headers={"Content-Range": ""})], "Its Content-Range is ''"),
    "nonsense": ([Fault(headers={"Content-Range": "bytes 5-x/9"})], "Its Content-Range is 'bytes 5-x/9'"),
    "another": ([Fault(headers={"Content-Range": "bytes 0-999999/3000000"})], "it sends 0-999999"),
    "beyond": ([Fault(headers={"Content-Range": "bytes 1000000-2999999/3000000"})], "sends 1000000-2999999"),
    "backwards": ([Fault(headers={"Content-Range": "bytes 1000000-5/3000000"})], "it sends 1000000-5"),
    "too many": ([Fault(headers={"Content-Range": "bytes 1000000-1000009/3000000"})], "than the 10 bytes"),
    "packed": ([Fault(headers={"Content-Encoding": "gzip"})], "It sends them packed, as 'gzip'"),
    "longer": ([Fault(body=BODY + b"x")], "It had 3,000,000 bytes, now 3,000,001"),
    "shorter": ([Fault(status=416)], "fewer than the 3,000,000 bytes of before"),
    "another commit": ([Fault(headers={"X-Repo-Commit": "f" * 40})], "the hub answers with ffff"),
    "teapot": ([Fault(status=418)], "status 418"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_is_given_up_is_said_in_plain_words(stack: ExitStack, case: str) -> None:
    faults, said = SAID[case]
    text = refusal(file_of(served(stack, *faults)))
    assert said in text
    assert text.startswith(f"{WHERE}: ")
    assert "\n" not in text


def test_content_that_changes_between_two_answers_is_noticed(stack: ExitStack) -> None:
    other = bytes(reversed(BODY))
    file = file_of(served(stack, None, Fault(body=other)))
    file.read(*RANGE)
    assert "has changed while it was read. Its etag was" in refusal(file)


def test_content_that_changes_behind_the_hub_is_noticed(stack: ExitStack) -> None:
    hub, _ = stored_apart(stack, Fault(status=403))
    file = file_of(hub, oid="a" * 64)
    assert f"Its etag was '{'a' * 64}', now '{sha256(BODY)}'" in refusal(file)
    hub.files["owner/name"][NAME] = BODY[:-1]
    assert "It had 3,000,000 bytes, now 2,999,999" in refusal(file_of(hub, oid=""))


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "GatedRepo", "is gated. 127.0.0.1"),
        (403, "GatedRepo", "Accept its terms on its page, then run `hf auth login`"),
        (401, "RepoNotFound", "is not on the hub, or is private"),
        (404, "", "is not on the hub, or is private"),
        (404, "RevisionNotFound", "has no such revision"),
        (404, "EntryNotFound", "is not in its repository"),
        (401, "", "may not be read"),
        (403, "", "Run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_refusals_name_the_next_command(stack: ExitStack, status: int, code: str, said: str) -> None:
    hub = served(stack, status={NAME: status}, code=code)
    assert said in refusal(file_of(hub))
    assert len(hub.asked) == 1, "a refusal is not asked for twice"


def test_a_server_that_is_not_there(stack: ExitStack) -> None:
    with serving(Hub({})) as gone:
        pass
    text = refusal(file_of(gone))
    assert "tried 3 times. Check the network" in text
    assert "secret" not in text


def test_reading_ends_when_it_is_ended(stack: ExitStack) -> None:
    file = file_of(served(stack, Fault(status=503)), patience=Patience(pause=60.0))
    file.ended.set()
    assert "is not read any more" in refusal(file)


def test_what_servers_ask_to_wait() -> None:
    assert asked_pause({"retry-after": " 7 "}) == 7.0
    assert asked_pause({"retry-after": "soon"}) is None
    assert asked_pause({}) is None
    assert asked_pause({"ratelimit": '"api";r=0;t=55'}) == 55.0
    assert asked_pause({"retry-after": email.utils.formatdate(0)}) == 0.0
    later = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert 95 < (asked_pause({"retry-after": later}) or 0) <= 100
    assert [Patience().pause_before(n, None) for n in (1, 2, 3)] == [0.5, 1.0, 2.0]
    assert Patience().pause_before(3, 9.0) == 9.0


def test_an_origin_is_scheme_host_and_port() -> None:
    assert origin("https://a.example/x") == origin("https://A.example:443/y?z")
    assert len({origin(f"{at}/x") for at in ("http://a", "https://a", "https://a:8443", "https://b")}) == 4


# --- blocks ----------------------------------------------------------------------------------------------


class Ranges:
    """A file that remembers what was read of it; its n-th four bytes are the number n."""

    def __init__(self) -> None:
        self.read_of: list[tuple[int, int]] = []

    def read(self, start: int, stop: int) -> bytes:
        self.read_of.append((start, stop))
        return numbers(start, stop)


def numbers(start: int, stop: int) -> bytes:
    return np.arange(start // 4, stop // 4, dtype="<u4").tobytes()


def ahead_of(file: Ranges) -> Callable[[int, int, tuple[int, int]], bytes]:
    """Reads parts of a file through blocks."""
    ahead = ReadAhead()
    return lambda start, stop, part: bytes(ahead.read(cast(RemoteFile, file), start, stop, part))


def test_rows_in_order_are_read_once_in_blocks_and_no_further_than_their_tensor() -> None:
    file, ahead, part = Ranges(), ReadAhead(), (1000, 1000 + 3 * BLOCK + 5000)
    step = 2 << 20
    for start in range(*part, step):
        stop = min(start + step, part[1])
        assert ahead.read(cast(RemoteFile, file), start, stop, part) == numbers(start, stop)
    first = part[0] + step  # the first read might have been the only one
    blocks = [(at, min(at + BLOCK, part[1])) for at in range(first, part[1], BLOCK)]
    assert sorted(file.read_of) == [(part[0], first), *blocks]
    assert not ahead._held, "what is used up is let go"
    ahead.close()


def test_a_few_rows_are_what_is_read_for_them() -> None:
    file, whole = Ranges(), (0, 9 * BLOCK)
    read = ahead_of(file)
    for at in (4 * BLOCK, 0, 400):
        assert read(at, at + 400, whole) == numbers(at, at + 400)
    assert read(8, 8, whole) == b""
    assert file.read_of == [(4 * BLOCK, 4 * BLOCK + 400), (0, 400), (400, 800)]


def test_blocks_are_read_ahead_within_bounds() -> None:
    file, ahead = Ranges(), ReadAhead()
    for start in (0, FEW):
        ahead.read(cast(RemoteFile, file), start, start + FEW, (0, 100 * BLOCK))
    ahead.pool.shutdown()
    blocks = [(FEW + n * BLOCK, FEW + (n + 1) * BLOCK) for n in range(AHEAD + 1)]
    assert sorted(file.read_of) == [(0, FEW), *blocks]


def test_pieces_here_and_there_are_what_is_read_for_them() -> None:
    file, whole = Ranges(), (0, 100 * BLOCK)
    read, asked = ahead_of(file), [(at, at + FEW) for at in (0, 3 * FEW, 50 * BLOCK, FEW // 2)]
    for start, stop in asked:
        assert read(start, stop, whole) == numbers(start, stop)
    assert file.read_of == asked


def test_a_tensor_that_is_read_again_is_read_in_blocks_again() -> None:
    file, end = Ranges(), 2 * BLOCK + 8
    read = ahead_of(file)
    for _ in range(2):
        assert read(0, end, (0, end)) == numbers(0, end)
    blocks = [(0, BLOCK), (BLOCK, 2 * BLOCK), (2 * BLOCK, end)]
    assert sorted(file.read_of) == sorted(2 * blocks)


def test_a_block_that_failed_is_asked_for_again() -> None:
    class Failing(Ranges):
        def read(self, start: int, stop: int) -> bytes:
            data = super().read(start, stop)
            if len(self.read_of) == 1:
                raise Lost("once")
            return data

    read = ahead_of(Failing())
    with pytest.raises(Lost):
        read(0, BLOCK, (0, BLOCK))
    assert read(0, BLOCK, (0, BLOCK)) == numbers(0, BLOCK)
