"""Sums the squares of the inputs of a block's matrices as it runs; of experts by the tokens that come.

Latent attention's kv_b is two tensors in a GGUF file, of which each head has a matrix. The one for values is
given the latent vectors; the one for keys, which the runtime applies to queries, their part without RoPE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import QuantizationError
from dsconvert.models.experts import Latent
from dsconvert.models.tensor_table import HEADS, HEADS_TURNED, Spec

if TYPE_CHECKING:
    import torch

Sums = dict[str, npt.NDArray[np.float32]]
Add = Callable[["torch.Tensor"], None]


def observe(
    decoder: st.Decoder, block: st.Block, hidden: torch.Tensor, specs: list[Spec], sums: Sums, counts: Sums
) -> torch.Tensor:
    """The states [n, length, d] after a block; adds what its matrices were given to `sums` and `counts`.

    `specs` are the block's tensors. Raises QuantizationError that names the linear whose inputs are not
    finite.
    """
    latent, watchers = decoder.config.latent, dict[str, list[Add]]()
    for spec in specs:
        if len(spec.shape) < 2 or spec.role == "router":
            continue
        many = spec.shape[0] if len(spec.shape) > 2 else 1
        sums[spec.gguf] = np.zeros((many, spec.shape[-1]), np.float32)
        counts[spec.gguf] = np.zeros(many, np.float32)
        add = partial(_add, sums[spec.gguf], counts[spec.gguf])
        if spec.row.transform is HEADS_TURNED:
            assert latent is not None  # no other layout has such rows
            watchers.setdefault(queries_of(block), []).append(partial(_of_queries, block, latent, many, add))
        else:
            for number, name in enumerate(spec.names):
                where = slice(None) if spec.row.transform is HEADS else slice(number, number + 1)
                watchers.setdefault(name, []).append(partial(add, where))

    def watching(name: str) -> Add:
        def seen(x: torch.Tensor) -> None:
            if not st.finite(x):
                raise QuantizationError(
                    "is given inputs that are not finite numbers",
                    where=name,
                    why="The checkpoint itself gives NaN or infinity on the calibration text",
                    hint="Look for damaged weights with `dsconvert inspect`, or fetch the checkpoint again",
                )
            for watch in watchers[name]:
                watch(x)

        return seen

    return st.run_block(decoder, block, hidden, {name: watching(name) for name in watchers})


def _add(
    sums: npt.NDArray[np.float32],
    counts: npt.NDArray[np.float32],
    where: slice,
    x: torch.Tensor,
    matrices: int = 1,
) -> None:
    """Add the squares of inputs [..., K], or [..., matrices, K], to the rows `where` of a tensor's sums."""
    squares = x.float().square().reshape(-1, matrices, x.shape[-1])
    sums[where] += squares.double().sum(0).cpu().numpy().astype(np.float32)
    counts[where] += len(squares)


def queries_of(block: st.Block) -> str:
    """The linear whose outputs are the queries."""
    ends = ("q_b_proj.weight", "q_proj.weight")
    return next(name for end in ends for name in block.linears if name.endswith(end))


def _of_queries(
    block: st.Block, latent: Latent, heads: int, add: Callable[..., None], x: torch.Tensor
) -> None:
    """Count the queries of inputs [batch, length, K], without what RoPE turns, for each head."""
    queries = block.linears[queries_of(block)].forward(x)
    each = queries.reshape(*x.shape[:2], heads, latent.nope + latent.rope)
    add(slice(None), each[..., : latent.nope], heads)
