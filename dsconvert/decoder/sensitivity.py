"""How much each output of each linear matters: the Fisher information of the model's own predictions.

A change d of a linear's outputs y moves the predicted distribution by KL = 1/2 d^T F d, F = E[g g^T] with
g the gradient by y of the log-likelihood of tokens drawn from the model (Amari 1998). Its diagonal, averaged
over tokens, weighs the errors of all linears in one currency: nats. One pass forward and one back, block by
block; the states between blocks stay in host memory.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import QuantizationError
from dsconvert.events import Event, Step

if TYPE_CHECKING:
    import torch

    Sensitivities = dict[str, torch.Tensor]


def sensitivities(
    decoder: st.Decoder, windows: st.IntArray, seed: int = 0
) -> Generator[Event, None, Sensitivities]:
    """The mean squared gradient by each output of each linear, head included: float32 [N] by tensor name.

    Of the embedding it is that by the states [d] before the first block, all tokens' rows being its outputs.
    `windows` int64 [n, length]; the mean is over their tokens, the gradient that of the sum of their
    log-likelihoods, so that 1/2 sum_n s_n E[d_n^2] is a linear's share of the mean KL divergence per token.
    Deterministic for a seed on one device. Raises QuantizationError where they are not finite.
    """
    import torch

    hidden = linear_inputs.embed(decoder, windows)
    before: list[torch.Tensor] = []
    yield Step(f"sensitivity: {windows.size} tokens forward and back through {decoder.config.layers} blocks")
    for index in range(decoder.config.layers):
        before.append(hidden.clone())
        block_walk.advance(decoder, st.load_block(decoder, index), hidden)
        if not st.finite(hidden):
            raise _broken(f"model.layers.{index}", "gives states that are not finite numbers")
    generator = torch.Generator(decoder.device).manual_seed(seed)
    found, gradient = _through_head(decoder, hidden, generator)
    for index in reversed(range(decoder.config.layers)):
        found |= _through_block(decoder, st.load_block(decoder, index), before.pop(), gradient)
    found[st.EMBED] = gradient.float().square().mean((0, 1))
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise _broken(name, "has gradients that are not finite numbers")
    return found


def _broken(where: str, what: str) -> QuantizationError:
    return QuantizationError(
        what,
        where=where,
        why="The checkpoint itself computes NaN or infinity on the calibration text",
        hint="Look for damaged weights with `dsconvert inspect`, or fetch the checkpoint again",
    )


def _through_head(
    decoder: st.Decoder, hidden: torch.Tensor, generator: torch.Generator
) -> tuple[Sensitivities, torch.Tensor]:
    """The head's own values, and the gradient [n, length, d] by the states before the final norm.

    By the logits the gradient of log p(y) is onehot(y) - p, whose mean square over y is p (1 - p).
    """
    import torch

    norm, head = st.head_weights(decoder)
    own = torch.zeros(head.shape[0], device=head.device)
    gradient = torch.empty_like(hidden)
    for row in range(len(hidden)):
        for part in st.chunks(0, hidden.shape[1], head.shape[0]):
            x = hidden[row, part].to(decoder.device).requires_grad_()
            with torch.enable_grad():
                normed = st.normed(decoder, norm, x)
            p = torch.nn.functional.linear(normed.detach(), head).float().softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)[:, 0]
            own += (p * (1 - p)).sum(0)
            p[torch.arange(len(p)), drawn] -= 1
            (g,) = torch.autograd.grad(normed, x, (-p).to(head.dtype) @ head)
            gradient[row, part] = g.to(gradient.device)
    return {st.HEAD: (own / hidden[..., 0].numel()).cpu()}, gradient


def _through_block(
    decoder: st.Decoder, block: st.Block, hidden: torch.Tensor, gradient: torch.Tensor
) -> Sensitivities:
    """The values of a block's linears; takes `gradient` from after the block to before it, in place."""
    import torch

    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, y: torch.Tensor) -> None:
        outputs[name] = y

    handles = [
        part.register_forward_hook(lambda module, args, y, name=name: keep(name, y))
        for name, part in block.linears.items()
    ]
    totals: Sensitivities = {}
    try:
        for rows in st.batches(decoder, *hidden.shape[:2]):
            x = hidden[rows].to(decoder.device).requires_grad_()
            with torch.enable_grad():
                y = st.apply(decoder, block, x)
            wanted = [x, *outputs.values()]
            first, *grads = torch.autograd.grad(y, wanted, gradient[rows].to(decoder.device))
            for name, g in zip(outputs, grads, strict=True):
                square = g.float().square().sum((0, 1)).cpu()
                totals[name] = totals[name] + square if name in totals else square
            gradient[rows] = first.to(gradient.device)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / hidden[..., 0].numel() for name, total in totals.items()}
