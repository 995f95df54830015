"""How much each output of each linear matters: the Fisher information of the model's own predictions.

A change d of a linear's outputs y moves the predicted distribution by KL = 1/2 d^T F d, F = E[g g^T] with
g the gradient by y of the log-likelihood of tokens drawn from the model (Amari 1998). Its diagonal, averaged
over tokens, weighs the errors of all linears in one currency: nats. One pass forward and one back, block by
block; the states between blocks stay in host memory.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.expert_gradients import backward_only
from dsconvert.decoder.experts import Names, attend
from dsconvert.decoder.linear_inputs import Run
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
    Of an expert's linears both means are over the tokens that come to it, the gate's weight counted.
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
    windows, length = hidden.shape[:2]
    sums = _Sums()
    if block.experts is None:
        run = partial(st.apply, decoder, block)
        _back(decoder, block, run, hidden, gradient, st.batches(decoder, windows, length), sums)
        return sums.means(())
    between = hidden.clone()
    block_walk.attend_all(decoder, block, between)
    with backward_only(block, sums.add):  # all windows at once, so that each expert is read once
        _back(decoder, block, partial(_through_mlp, block), between, gradient, [slice(windows)], sums)
    run = partial(attend, decoder, block)
    _back(decoder, block, run, hidden, gradient, st.batches(decoder, windows, length), sums)
    return sums.means(block.experts.names)


@dataclass(frozen=True, eq=False)
class _Sums:
    """Squares of the gradients by the outputs of each linear, summed over tokens, and how many these are."""

    totals: Sensitivities = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, g: torch.Tensor) -> None:
        """Take in gradients [..., N]."""
        square = g.float().square().flatten(0, -2).sum(0).cpu()
        self.totals[name] = self.totals[name] + square if name in self.totals else square
        self.tokens[name] = self.tokens.get(name, 0) + g[..., 0].numel()

    def means(self, experts: Sequence[Names]) -> Sensitivities:
        """The means; of an expert that no token came to those over all experts."""
        found = {name: total / self.tokens[name] for name, total in self.totals.items()}
        for names in zip(*experts, strict=True):
            seen = [name for name in names if name in found]
            together = sum(self.totals[name] for name in seen) / sum(self.tokens[name] for name in seen)
            found |= {name: together for name in names if name not in found}
        return found


def _through_mlp(block: st.Block, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = x + block.module.mlp(block.module.post_attention_layernorm(x))
    return found


def _back(
    decoder: st.Decoder,
    block: st.Block,
    run: Run,
    hidden: torch.Tensor,
    gradient: torch.Tensor,
    batches: Iterable[slice],
    sums: _Sums,
) -> None:
    """Take `gradient` back through what `run` makes of the states, in place, and sum those of its linears.

    One that has no gradient, as those of an indexer have none, is left out.
    """
    import torch

    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, y: torch.Tensor) -> None:
        if y.requires_grad:
            outputs[name] = y

    handles = [
        part.register_forward_hook(lambda module, args, y, name=name: keep(name, y))
        for name, part in block.linears.items()
    ]
    try:
        for rows in batches:
            x = hidden[rows].to(decoder.device).requires_grad_()
            with torch.enable_grad():
                y = run(x)
            wanted = [x, *outputs.values()]
            first, *grads = torch.autograd.grad(y, wanted, gradient[rows].to(decoder.device))
            for name, g in zip(outputs, grads, strict=True):
                sums.add(name, g)
            gradient[rows] = first.to(gradient.device)
    finally:
        for handle in handles:
            handle.remove()
