"""What the inputs of a decoder's linears look like on calibration windows: their moments, batch by batch.

The states of the text between blocks stay in host memory; a batch of windows at a time visits the device.
Where weights are replaced on the way, the last linear of attention and of the MLP runs after its inputs were
measured: on a CPU as many of them as memory is free for stay there, and the linears before it run once and
not twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import CheckpointError, QuantizationError
from dsconvert.machine import free_memory
from dsconvert.models.config import ModelConfig

if TYPE_CHECKING:
    import torch

Run = Callable[["torch.Tensor"], "torch.Tensor"]
Use = Callable[[slice, "torch.Tensor"], None]  # is given windows, and what is made of them
Linears = Mapping[str, "torch.nn.Linear"]
KEPT = 1 / 4  # of the free memory, at the most, for what a last linear is given
WIDTH = 256  # rows of a moment that are computed at once


@dataclass(frozen=True, eq=False)
class Group:
    """Linears of one block, by the names of their weights, that share their input X [rows, K].

    `moment` is 2/rows X^T X in float32 [K, K], the Hessian of the squared error of a linear's output, or
    its diagonal [K]; zeros without rows. `routed` says that X are the tokens of one expert. Of latent
    attention's keys as a runtime multiplies by them, head by head, X are the queries: a moment for each head
    [heads, K, K].
    """

    linears: Linears
    moment: torch.Tensor
    rows: int
    routed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(self.linears)


def check_dense(config: ModelConfig, where: object = None) -> None:
    """Raise CheckpointError for a model with experts or latent attention; some files are for dense ones."""
    found = "experts" if config.experts else "latent attention" if config.latent else ""
    if found:
        raise CheckpointError(
            f"{config.architecture} has {found}, for which error feedback is not made here",
            where=where,
            why="EXL2 is made of dense models only",
            hint="dsconvert gptq quantizes it; dsconvert gguf takes --calib c4 for an importance matrix",
        )


def embed(decoder: st.Decoder, windows: st.IntArray) -> torch.Tensor:
    """The windows [n, length] as states [n, length, d] in host memory; reads the table in slices.

    Raises UsageError for an id outside the table.
    """
    import torch

    config = decoder.config
    st.check_ids(windows, config.vocab_size)
    used, places = np.unique(windows, return_inverse=True)
    rows = []
    for part in st.slices(config.vocab_size, config.hidden_size):
        wanted = used[(used >= part.start) & (used < part.stop)] - part.start
        if wanted.size:
            rows.append(st.read(decoder, st.EMBED, part).cpu()[torch.from_numpy(wanted)])
    return st.embed(torch.cat(rows), places.reshape(windows.shape), decoder.dtype)


def last(
    decoder: st.Decoder,
    hidden: torch.Tensor,
    linears: Linears,
    run: Run,
    add: Use,
    diagonal: bool,
    fixed: bool,
) -> Iterator[Group]:
    """Give the group of the linear that ends `run`; `add` is then given what `run` makes of the states."""
    import torch

    (linear,) = linears.values()
    given = input_of(linear, run)
    if fixed:
        yield measured(decoder, hidden, linears, given, diagonal, lambda rows, X: add(rows, linear(X)))
        return
    fit = room(decoder, hidden.shape[0], hidden.shape[1], linear.in_features)
    kept = hidden.new_empty((fit, hidden.shape[1], linear.in_features))

    def keep(rows: slice, X: torch.Tensor) -> None:
        if rows.stop <= fit:
            kept[rows] = X

    yield measured(decoder, hidden, linears, given, diagonal, keep)
    with torch.no_grad():
        for rows in st.batches(decoder, *hidden.shape[:2]):
            if rows.stop <= fit:
                add(rows, linear(kept[rows]))
    added(decoder, hidden, run, add, after=fit)


def room(decoder: st.Decoder, windows: int, length: int, inputs: int) -> int:
    """How many of the windows a last linear's `inputs` are kept of, by the memory that is free."""
    if decoder.device.type != "cpu":  # a device computes faster than it could fetch what was kept
        return 0
    return min(windows, int(KEPT * free_memory() / (length * inputs * decoder.dtype.itemsize)))


def measure_head(
    decoder: st.Decoder, hidden: torch.Tensor, norm: torch.Tensor, diagonal: bool = False
) -> Group:
    """What the head is given: the states [n, length, d] after the last block through the final norm [d].

    Raises QuantizationError where it is not finite.
    """
    import torch

    head = torch.nn.Linear(hidden.shape[-1], decoder.config.vocab_size, bias=False, device="meta")
    return measured(decoder, hidden, {st.HEAD: head}, lambda x: st.normed(decoder, norm, x), diagonal)


class _Reached(Exception):
    """Ends a run at the linear whose inputs were asked for."""


def input_of(linear: torch.nn.Linear, run: Run) -> Run:
    """What `linear` is given while `run` runs; it is not computed itself."""

    def watched(x: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def stop(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0])
            raise _Reached

        handle = linear.register_forward_pre_hook(stop)
        try:
            with suppress(_Reached):
                run(x)
        finally:
            handle.remove()
        return seen[0]

    return watched


def added(decoder: st.Decoder, hidden: torch.Tensor, run: Run, add: Use, after: int = 0) -> None:
    """Give `add` what `run` makes of the states, a batch of windows at a time, of those that end `after` so
    many windows.
    """
    import torch

    with torch.no_grad():
        for rows in st.batches(decoder, hidden.shape[0], hidden.shape[1]):
            if rows.stop > after:
                add(rows, run(hidden[rows].to(decoder.device)))


def measured(
    decoder: st.Decoder,
    hidden: torch.Tensor,
    linears: Linears,
    inputs: Run,
    diagonal: bool = False,
    use: Use | None = None,
) -> Group:
    """The moment as a running mean: no sum grows with the number of tokens, so float32 is enough.

    `use` is given each batch of inputs [windows, length, K] as it is measured.
    """
    import torch

    K = next(iter(linears.values())).in_features
    moment, seen = torch.zeros((K,) if diagonal else (K, K), device=decoder.device), 0
    with torch.no_grad():
        for rows in st.batches(decoder, hidden.shape[0], hidden.shape[1]):
            given = inputs(hidden[rows].to(decoder.device))
            X = given.flatten(0, -2)
            seen += len(X)
            _take_in(moment, X, len(X) / seen)
            if use is not None:
                use(rows, given)
    if moment.ndim == 2:
        for i in range(0, len(moment), WIDTH):
            moment[:i, i : i + WIDTH] = moment[i : i + WIDTH, :i].T
    if not st.finite(moment):
        raise QuantizationError(
            "is given inputs that are not finite numbers",
            where=next(iter(linears)),
            why="The checkpoint itself computes NaN or infinity on the calibration text",
            hint="Look for damaged weights with `dsconvert inspect`, or fetch the checkpoint again",
        )
    return Group(linears, moment, seen)


def _take_in(moment: torch.Tensor, X: torch.Tensor, share: float) -> None:
    """Move the mean by a batch X [rows, K] that is `share` of all rows by now: its lower half, or diagonal.

    The batch is summed apart: added to the mean term by term (addmm) it would lose digits, 2e-4.
    """
    import torch

    if moment.ndim == 1:
        moment.lerp_(X.float().square().sum(0).mul_(2 / len(X)), share)
        return
    halves = X.dtype != torch.float32 and multiplies_halves(X.device.type, X.dtype)
    X = X if halves else X.float()
    for i in range(0, len(moment), WIDTH):
        rows, own, before = moment[i : i + WIDTH, : i + WIDTH], X[:, i : i + WIDTH].T, X[:, : i + WIDTH]
        product = torch.mm(own, before, out_dtype=torch.float32) if halves else own @ before
        rows.lerp_(product.mul_(2 / len(X)), share)


@cache
def multiplies_halves(device: str, dtype: torch.dtype) -> bool:
    """Whether a device has products of 16-bit numbers that are summed, and returned, in float32.

    These are as exact as products of the same numbers in float32, and many times faster.
    """
    import torch

    one = torch.ones((16, 16), dtype=dtype, device=device)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):  # NotImplementedError is one; an older torch knows no out_dtype
        return False
