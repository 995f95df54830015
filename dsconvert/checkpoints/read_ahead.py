"""Reads parts of remote files in blocks of some megabytes, the next ones before they are asked for.

A conversion reads a tensor from its first row to its last in pieces, on many threads; a proof reads a few
rows here and there. Who goes on where another read ended gets blocks, which are fetched once and let go when
they are used up; the others get what they ask for and no more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from dsconvert.checkpoints.remote_file import RemoteFile

BLOCK = 8 << 20
AHEAD = 2  # blocks that are fetched beside the one in use
CONNECTIONS = 4
FEW = 512 << 10  # bytes: who asks for fewer does not read on
HELD = 32  # blocks at the most that are kept; those of a tensor that is read to its end are gone by then

Part = tuple[int, int]  # the file's identity and the first byte of one tensor in it


@dataclass(eq=False)
class _Block:
    data: Future[bytes]
    left: int  # bytes of it that nobody has had


@dataclass(eq=False)
class ReadAhead:
    """The blocks of all files of a model that are here or on their way; all threads may read."""

    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(CONNECTIONS, "hub"))
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _held: OrderedDict[tuple[int, int], _Block] = field(default_factory=OrderedDict)
    _begun: dict[Part, int] = field(default_factory=dict)  # where the blocks of a tensor begin
    _ends: dict[Part, set[int]] = field(default_factory=lambda: defaultdict(set))  # of reads before that

    def read(self, file: RemoteFile, start: int, stop: int, span: tuple[int, int]) -> bytes | memoryview:
        """Bytes `start` to `stop` - 1 of a file; they are in the tensor `span`, beyond which nothing is read.

        Raises what `RemoteFile.read` does.
        """
        few, first = stop - start < FEW, self._first_block(file, start, stop, span[0])
        if first is None:
            return file.read(start, stop) if stop > start else b""
        found, beyond = bytearray(stop - start), 1 if few else AHEAD + 1
        for at in range(first, stop, BLOCK):
            data = self._block(file, at, span[1]).data
            for ahead in range(at + BLOCK, min(at + beyond * BLOCK, span[1]), BLOCK):
                self._block(file, ahead, span[1])
            low, high = max(start, at), min(stop, at + BLOCK, span[1])
            found[low - start : high - start] = memoryview(data.result())[low - at : high - at]
            self._used(file, at, high - low)
        return memoryview(found).toreadonly()

    def _first_block(self, file: RemoteFile, start: int, stop: int, first: int) -> int | None:
        """Where the block that holds `start` begins; None for a read that gets none."""
        part = id(file), first
        with self._lock:
            begun = self._begun.get(part)
            if begun is not None and start >= begun:
                at = start - (start - begun) % BLOCK
                return at if stop - start >= FEW or (id(file), at) in self._held else None
            if stop - start < FEW:
                return None
            if start not in self._ends[part] and stop - start < BLOCK:
                self._ends[part].add(stop)
                return None
            self._begun[part] = start
            return start

    def _block(self, file: RemoteFile, at: int, end: int) -> _Block:
        key = id(file), at
        with self._lock:
            block = self._held.get(key)
            if block is None or (block.data.done() and block.data.exception() is not None):
                stop = min(at + BLOCK, end)
                block = self._held[key] = _Block(self.pool.submit(file.read, at, stop), stop - at)
            self._held.move_to_end(key)
            while len(self._held) > HELD:
                self._held.popitem(last=False)
        return block

    def _used(self, file: RemoteFile, at: int, nbytes: int) -> None:
        with self._lock:
            block = self._held.get((id(file), at))
            if block is not None:
                block.left -= nbytes
                if block.left <= 0:
                    del self._held[id(file), at]

    def close(self) -> None:
        """Fetch nothing more; what is on its way is left."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._held.clear()
