"""Gradients through the experts of a block, one expert after the other, each read once and dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dsconvert.decoder.experts import Names, StreamedExperts

if TYPE_CHECKING:
    import torch

    from dsconvert.decoder.torch_decoder import Block

Add = Callable[[str, "torch.Tensor"], None]  # the name of a matrix, the gradients by its outputs [tokens, N]


@contextmanager
def backward_only(block: Block, add: Add) -> Iterator[None]:
    """The block with experts that add nothing to states, and give the gradients of what they would add.

    So a run back reads each of them once; its states are not those of the block. `add` is given the gradients
    by what each matrix gives, of the tokens that come to its expert.
    """
    assert block.experts is not None  # the caller knows
    experts = block.experts

    def stand_in(hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _function(experts, add).apply(hidden, weights, index)
        return found

    block.module.mlp.experts = stand_in
    try:
        yield
    finally:
        block.module.mlp.experts = experts


def _function(experts: StreamedExperts, add: Add) -> Any:
    """Of states [tokens, d], weights [tokens, used] and the experts that they are of, as many."""
    import torch

    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: torch.Tensor, weights: torch.Tensor, index: torch.Tensor) -> Any:
            ctx.save_for_backward(hidden, weights, index)
            return torch.zeros_like(hidden)

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            hidden, weights, index = ctx.saved_tensors
            by_hidden, by_weights = torch.zeros_like(hidden), torch.zeros_like(weights)
            for expert in sorted(set(index.flatten().tolist())):
                token, place = torch.where(index == expert)
                own, gradient = weights[token, place], grads[0][token]
                x, y, each = _one(experts, experts.names[expert], hidden[token], gradient * own[:, None])
                by_hidden.index_add_(0, token, x.to(by_hidden.dtype))
                by_weights[token, place] = (y * gradient).sum(-1).to(by_weights.dtype)
                for name, g in each.items():
                    add(name, g)
            return by_hidden, by_weights, None

    return Experts


def _one(
    experts: StreamedExperts, names: Names, x: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The gradients by states [tokens, d] of an expert, what it makes of them, and those by each matrix's
    outputs, from the gradient by all of it.
    """
    import torch

    gate, up, down = (experts.load(name) for name in names)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        inner = (x @ gate.T, x @ up.T)
        y = (torch.nn.functional.silu(inner[0]) * inner[1]) @ down.T
    by_x, *each = torch.autograd.grad(y, [x, *inner], gradient.to(y.dtype))
    return by_x, y.detach(), dict(zip(names, (*each, gradient), strict=True))
