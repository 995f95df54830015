"""Walks a decoder block over calibration windows: its linears in solve order, those of one input together.

Of latent attention the inner linears come after those that make their vectors. Experts come one after the
other, each with the tokens that the router sends to it, and only one is in memory; what all add up to is
beside the states until the last one is through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dsconvert.decoder import torch_decoder as st
from dsconvert.decoder.expert_inputs import queries_of
from dsconvert.decoder.experts import Names, attention
from dsconvert.decoder.linear_inputs import Group, Linears, Run, Use, added, input_of, last, measured
from dsconvert.models.architectures import find_architecture
from dsconvert.models.experts import Latent
from dsconvert.models.tensor_table import Role, expand

if TYPE_CHECKING:
    import torch


def groups(decoder: st.Decoder, index: int) -> list[tuple[str, ...]]:
    """The weights of a block's linears in solve order, those with the same input together."""
    own = _by_role(decoder, index)
    found = [own["qkv"], *((name,) for name in own["latent"]), own["o"], own["gate_up"], own["down"]]
    for gate, up, down in decoder.experts[index]:
        found += [(gate, up), (down,)]
    return [group for group in found if group]


def walk(
    decoder: st.Decoder, block: st.Block, hidden: torch.Tensor, diagonal: bool = False, fixed: bool = False
) -> Iterator[Group]:
    """Take the states [n, length, d] through a block, in place, giving each group of linears on the way.

    A weight that the caller changes in a group's `linears` before it takes the next group counts from there
    on, as GPTQ asks for; with `fixed` it changes none, the last linears run once, and latent attention's
    keys come once more, with the moments of the queries. Raises QuantizationError that names the linear whose
    inputs are not finite.
    """
    own, module = _by_role(decoder, block.index), block.module
    through = _attention(decoder, block)
    yield measured(decoder, hidden, _picked(block, own["qkv"]), module.input_layernorm, diagonal)
    for name in own["latent"]:
        given = input_of(block.linears[name], through)
        yield measured(decoder, hidden, _picked(block, (name,)), given, diagonal)
    if fixed and decoder.config.latent is not None:
        yield _of_queries(decoder, block, hidden, decoder.config.latent)
    yield from last(decoder, hidden, _picked(block, own["o"]), through, _onto(hidden), diagonal, fixed)
    if own["gate_up"]:
        gate_up = _picked(block, own["gate_up"])
        yield measured(decoder, hidden, gate_up, module.post_attention_layernorm, diagonal)
    down = _picked(block, own["down"])
    if block.experts is None:
        yield from last(decoder, hidden, down, _mlp(block), _onto(hidden), diagonal, fixed)
        return
    if down:  # of the expert that all tokens go to
        with _recording(block):
            given = input_of(block.linears[own["down"][0]], _mlp(block))
            yield measured(decoder, hidden, down, given, diagonal)
    yield from _experts(decoder, block, hidden, diagonal, fixed)


def advance(decoder: st.Decoder, block: st.Block, hidden: torch.Tensor) -> None:
    """Take the states through a block, in place, to the very bits that `walk` leaves."""
    attend_all(decoder, block, hidden)
    if block.experts is None:
        added(decoder, hidden, _mlp(block), _onto(hidden))
        return
    total, routes = _routed(decoder, block, hidden)
    for expert, names in enumerate(block.experts.names):
        share = routes.of(expert)
        if len(share.tokens):
            linears = _loaded(block.experts.load, names)
            added(decoder, share.states(hidden), _expert(block, linears), share.onto(total))
    hidden.copy_(total)


def attend_all(decoder: st.Decoder, block: st.Block, hidden: torch.Tensor) -> None:
    """Take the states through a block's attention, in place."""
    added(decoder, hidden, _attention(decoder, block), _onto(hidden))


def _by_role(decoder: st.Decoder, index: int) -> dict[Role, tuple[str, ...]]:
    """A block's own linears, without those of experts, by their place in the solve order."""
    here = set(decoder.blocks[index].values())
    found: dict[Role, dict[str, None]] = {role: {} for role in ("qkv", "latent", "o", "gate_up", "down")}
    for spec in expand(find_architecture(decoder.config.architecture).table, decoder.config):
        if spec.role in found and spec.hf in here and spec.hf.endswith(".weight"):
            found[spec.role][spec.hf] = None  # once, though two tensors of a file may be made of it
    return {role: tuple(names) for role, names in found.items()}


def _picked(block: st.Block, names: tuple[str, ...]) -> Linears:
    return {name: block.linears[name] for name in names}


def _attention(decoder: st.Decoder, block: st.Block) -> Run:
    return lambda x: attention(decoder, block, x)


def _of_queries(decoder: st.Decoder, block: st.Block, hidden: torch.Tensor, latent: Latent) -> Group:
    """What the keys are given where a runtime applies them to queries: these without what RoPE turns."""
    import torch

    name = queries_of(block)
    given = input_of(block.linears[name], _attention(decoder, block))
    heads, moment, seen = decoder.config.heads, torch.zeros((), device=decoder.device), 0
    with torch.no_grad():
        for rows in st.batches(decoder, *hidden.shape[:2]):
            each = block.linears[name].forward(given(hidden[rows].to(decoder.device)))
            X = each.reshape(-1, heads, latent.nope + latent.rope)[..., : latent.nope].float().transpose(0, 1)
            seen += X.shape[1]
            moment = torch.lerp(moment, 2 / X.shape[1] * X.mT @ X, X.shape[1] / seen)
    keys = next(name for name in block.linears if name.endswith("kv_b_proj.weight"))
    return Group(_picked(block, (keys,)), moment, seen)


def _mlp(block: st.Block) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = block.module.mlp(block.module.post_attention_layernorm(x))
        return result

    return run


def _onto(hidden: torch.Tensor) -> Use:
    def add(rows: slice, found: torch.Tensor) -> None:
        hidden[rows] = (hidden[rows].to(found.device) + found).to(hidden.device)

    return add


@dataclass(frozen=True, eq=False)
class Share:
    """The tokens that go to an expert, by their places in all windows, and the weights [tokens, 1, 1]."""

    tokens: torch.Tensor
    weights: torch.Tensor

    def states(self, hidden: torch.Tensor) -> torch.Tensor:
        """Their states, a copy, as windows of one token [tokens, 1, d]."""
        return hidden.flatten(0, 1)[self.tokens, None]

    def onto(self, total: torch.Tensor) -> Use:
        """Adds what the expert makes of some of them to the states `total` [n, length, d]."""
        flat = total.view(-1, total.shape[-1])

        def add(rows: slice, found: torch.Tensor) -> None:
            part = found.to(total.device) * self.weights[rows]
            flat.index_add_(0, self.tokens[rows], part[:, 0].to(total.dtype))

        return add


@dataclass(frozen=True, eq=False)
class Routes:
    """Stands in for a block's experts: notes which tokens go to which with what weights, and adds nothing."""

    index: list[torch.Tensor] = field(default_factory=list)
    weights: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Note the experts `index` [tokens, used] of more states [tokens, d], and their `weights`."""
        self.index.append(index.cpu())
        self.weights.append(weights.cpu())
        return hidden.new_zeros(hidden.shape)

    def of(self, expert: int) -> Share:
        """What goes to an expert."""
        import torch

        tokens, place = torch.where(torch.cat(self.index) == expert)
        return Share(tokens, torch.cat(self.weights)[tokens, place, None, None])


@contextmanager
def _recording(block: st.Block) -> Iterator[Routes]:
    """The block with a stand-in for its experts."""
    routes = Routes()
    block.module.mlp.experts = routes
    try:
        yield routes
    finally:
        block.module.mlp.experts = block.experts


def _routed(decoder: st.Decoder, block: st.Block, hidden: torch.Tensor) -> tuple[torch.Tensor, Routes]:
    """The states with what the expert adds that all tokens go to, and where they go besides."""
    total = hidden.clone()
    with _recording(block) as routes:
        added(decoder, hidden, _mlp(block), _onto(total))
    return total, routes


def _experts(
    decoder: st.Decoder, block: st.Block, hidden: torch.Tensor, diagonal: bool, fixed: bool
) -> Iterator[Group]:
    """The groups of each expert; takes the states through all of them, in place."""
    assert block.experts is not None  # the caller knows
    total, routes = _routed(decoder, block, hidden)
    norm = block.module.post_attention_layernorm
    for expert, names in enumerate(block.experts.names):
        share, linears = routes.of(expert), _loaded(block.experts.load, names)
        states = share.states(hidden)
        gate_up, down = ({name: linears[name] for name in part} for part in (names[:2], names[2:]))
        yield replace(measured(decoder, states, gate_up, norm, diagonal), routed=True)
        run = _expert(block, linears)
        for group in last(decoder, states, down, run, share.onto(total), diagonal, fixed):
            yield replace(group, routed=True)
    hidden.copy_(total)


def _loaded(load: Callable[[str], torch.Tensor], names: Names) -> Linears:
    """The matrices of an expert as linears."""
    import torch

    found = {}
    for name in names:
        weight = load(name)
        outputs, inputs = weight.shape
        found[name] = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
        found[name].weight = torch.nn.Parameter(weight, requires_grad=False)
    return found


def _expert(block: st.Block, linears: Linears) -> Run:
    """What an expert makes of states, without the weight of its part."""
    from torch.nn.functional import silu

    gate, up, down = linears.values()
    norm = block.module.post_attention_layernorm

    def run(x: torch.Tensor) -> torch.Tensor:
        x = norm(x)
        result: torch.Tensor = down(silu(gate(x)) * up(x))
        return result

    return run
