"""Which experts the runtime takes where its rule is not the model's, and what that makes of the same weights.

Of DeepSeek-V2 and V2.5 (236B) a token goes to experts of the groups with the best single scores; llama.cpp
takes groups by the sum of their two best, V3's rule, whatever a file says. The proof runs the model's own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.events import Check, Event, Step
from dsconvert.models.config import ModelConfig
from dsconvert.models.experts import RUNTIME_BEST, Experts
from dsconvert.models.weights import WeightSource
from dsconvert.proof.scores import hidden_states, scored_states
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch


def rule_for(config: ModelConfig) -> RuntimeRule | None:
    """The runtime's rule, of a model with another one; None where they are the same."""
    experts = config.experts
    return RuntimeRule(experts) if experts is not None and experts.chosen_otherwise else None


def best_of_groups(scores: torch.Tensor, experts: Experts, best: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The chosen of scores [tokens, experts] and their scores, each [tokens, used].

    Groups count by the sum of their `best` best scores.
    """
    import torch

    groups = scores.view(len(scores), experts.groups, -1)
    worth = groups.topk(min(best, groups.shape[-1]), -1).values.sum(-1)
    taken = torch.zeros_like(worth, dtype=torch.bool)
    taken.scatter_(1, worth.topk(experts.groups_used, -1).indices, True)
    left = groups.masked_fill(~taken[..., None], -torch.inf).view_as(scores)
    chosen = left.topk(experts.used, -1).indices
    return chosen, scores.gather(1, chosen)


@dataclass
class RuntimeRule:
    """Lets blocks choose experts as the runtime does; counts choices, and those of the model that differ."""

    experts: Experts
    tokens: int = field(default=0, init=False)
    elsewhere: int = field(default=0, init=False)

    def install(self, block: st.Block) -> None:
        """Change the choice of a block that has experts; its router is the model's own."""
        if block.experts is not None:
            gate = block.module.mlp.gate
            gate.register_forward_hook(self._choose)

    def _choose(self, gate: Any, args: tuple[Any, ...], found: tuple[torch.Tensor, ...]) -> tuple[Any, ...]:
        logits, _, own = found
        chosen, scores = best_of_groups(logits.float().softmax(-1), self.experts, RUNTIME_BEST)
        self.tokens += len(own)
        self.elsewhere += int((own.sort(-1).values != chosen.sort(-1).values).any(-1).sum())
        return logits, (scores * self.experts.scale).to(found[1].dtype), chosen


def judge_rule(
    source: WeightSource,
    config: ModelConfig,
    states: torch.Tensor,
    windows: Windows,
    device: str = "auto",
    dtype: str | None = None,
) -> Generator[Event, None, list[Check]]:
    """A line on what the runtime's rule makes of a file's weights; it is no fault of it, and always passes.

    `states` [tokens, d] are the file's by the model's own rule after the final norm, where predictions are
    scored. Runs the file once more. No line where the rules are the same.
    """
    rule = rule_for(config)
    if rule is None:
        return []
    place = st.pick_device(device)
    decoder = st.open_decoder(source, config, place, st.pick_dtype(dtype, place))
    yield Step("running the file by llama.cpp's rule on groups of experts, which is not the model's")

    def install(block: st.Block) -> dict[str, Any]:
        rule.install(block)
        return {}

    hidden = yield from hidden_states(decoder, windows, install)
    norm, head = st.head_weights(decoder)
    others = scored_states(decoder, norm, hidden, windows)
    parts = []
    for rows in st.chunks(0, len(states), decoder.config.vocab_size):
        a, b = ((x[rows] @ head.T).double().log_softmax(-1) for x in (states, others))
        parts.append((a.exp() * (a - b)).sum(-1).clamp(min=0.0).cpu().numpy())
    kld = float(np.concatenate(parts).mean())
    share = rule.elsewhere / max(rule.tokens, 1)
    detail = (
        f"the figures are of the model's rule; by llama.cpp's, which takes groups by the sum of two scores, "
        f"{share:.2%} of choices differ, and the mean KLD from this file's own predictions is {kld:.3g}"
    )
    found = Check("runtime's rule", True, detail, kld)
    yield found
    return [found]
