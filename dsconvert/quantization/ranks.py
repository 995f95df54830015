"""Several processes at one quantization, one for each GPU, as torchrun starts them: thin verbs on top of
torch.distributed. One process alone is a group of one, for which every verb does nothing.

Whatever a process does alone between two exchanges stands in `together`, so that its error ends all of them:
the first process reports it, the others exit silently.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from dsconvert.errors import ConversionError, UsageError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
# A process waits while another one loads a text or solves a big linear; a dead one is found out at once.
TIMEOUT = timedelta(hours=12)


class ToldElsewhere(Exception):
    """Another process reports the error; this one only exits."""


class Gone(ConversionError):
    """Another process has died."""


@dataclass(frozen=True)
class Ranks:
    """This process's number among `count`, and its number on this machine, which is that of its GPU."""

    rank: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device of this process: its own GPU where there are any and none is `asked` for by number.

        Raises UsageError for a number, which would be the same for all.
        """
        import torch

        if self.count == 1 or asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
            return asked
        if asked not in ("auto", "cuda"):
            raise UsageError(
                f"--device {asked} is one device for {self.count} processes",
                hint="Leave --device out: each process takes a GPU of its own",
            )
        return f"cuda:{self.local}"

    def share(self, total: int) -> slice:
        """This process's part of `total` things, as even as can be; UsageError where some would have none."""
        if total < self.count:
            raise UsageError(
                f"{total} calibration windows for {self.count} processes",
                hint=f"Give --calib-samples {self.count} or more",
            )
        return slice(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def owner(self, index: int) -> int:
        """The process that does the job of this number."""
        return index % self.count

    def mean(self, own: torch.Tensor, weight: int) -> tuple[torch.Tensor, int]:
        """The mean of every process's tensor, in place, counted `weight` times, and the sum of weights."""
        if self.count == 1:
            return own, weight
        import torch
        from torch import distributed

        with _alive():
            total = torch.tensor([float(weight)], dtype=torch.float64)
            distributed.all_reduce(total)
            own.mul_(weight / max(1.0, float(total)))
            distributed.all_reduce(own)
        return own, int(total)

    def send(self, tensor: torch.Tensor, owner: int) -> None:
        """Overwrite every process's `tensor` with the owner's."""
        if self.count == 1:
            return
        from torch import distributed

        with _alive():
            distributed.broadcast(tensor, owner)

    def shared(self, value: Value, owner: int = 0) -> Value:
        """The owner's `value`, on every process; it is pickled."""
        if self.count == 1:
            return value
        from torch import distributed

        held = [value]
        with _alive():
            distributed.broadcast_object_list(held, owner)
        return held[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is done here is done when all processes have done it; the first error of any ends all.

        Raises it on the first process, ToldElsewhere on the others.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except ToldElsewhere:
            raise
        except Exception as raised:
            error = raised
        self._agree(error)

    def _agree(self, error: Exception | None) -> None:
        from torch import distributed

        told: list[Any] = [None] * self.count
        if error is not None and not isinstance(error, ConversionError):
            error = RuntimeError(f"{type(error).__name__} in process {self.rank}: {error}")  # can be pickled
        with _alive():
            distributed.all_gather_object(told, error)
        first = next((found for found in told if found is not None), None)
        if first is not None:
            raise first if self.first else ToldElsewhere


ALONE = Ranks()


@contextmanager
def joined() -> Iterator[Ranks]:
    """The group that torchrun has started this process for; alone without torchrun."""
    if _count() == 1:
        yield ALONE
        return
    import torch
    from torch import distributed

    ranks = Ranks(int(os.environ["RANK"]), _count(), int(os.environ["LOCAL_RANK"]))
    if ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=TIMEOUT)
    yield ranks
    if torch.cuda.is_available():  # NCCL may still be sending; after an error the others may be gone
        distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End the process; one of a group at once, for torch's threads may abort it while Python shuts down."""
    if _count() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _count() -> int:
    """How many processes torchrun has started; 1 without it."""
    count = os.environ.get("WORLD_SIZE", "1")  # set by torchrun
    return max(int(count), 1) if count.isdecimal() else 1


@contextmanager
def _alive() -> Iterator[None]:
    """An exchange; raises Gone when another process is."""
    try:
        yield
    except RuntimeError as error:
        raise Gone(
            "another process of this run has ended",
            why=str(error).strip().splitlines()[0][:200],
            hint="Its own message may stand above; finished blocks are kept for --resume",
        ) from None
