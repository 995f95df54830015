"""What the memory formula needs to know of a model: its sizes, and the bytes of what a card holds whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Spec, expand, plan


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder.

    `inner` is the width of the widest MLP that a token goes through, of all its experts together.
    `cached` is how many values its keys and values have in each layer, which is what a cache keeps of it; of
    latent attention a runtime may keep the `latent` vector that they are made of, 0 where there is none.
    `indexed` is how many values the key of an indexer has, which is kept besides.
    """

    hidden: int
    inner: int
    heads: int
    cached: int
    latent: int
    vocab: int
    context: int
    indexed: int = 0


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights: embedding, blocks, head with the norm before it, and all that is beside.

    A head that is the embedding has no bytes of its own. `beside` are vision towers and their aligner.
    """

    embedding: int
    blocks: tuple[int, ...]
    head: int
    beside: int = 0
    tied: bool = False

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + sum(self.blocks) + self.head + self.beside


@dataclass(frozen=True)
class Made:
    """A type: which runtimes take it, its weights, and the command that makes it ("" where it is there)."""

    type: str
    runtimes: tuple[str, ...]
    weights: Weights
    command: str


@dataclass(frozen=True)
class Sized:
    """A model: its decoder's sizes, how many weights it has, and the types that it may have."""

    name: str
    path: Path
    decoder: Decoder
    parameters: int
    types: tuple[Made, ...]
    notes: tuple[str, ...] = ()


def decoder_of(config: ModelConfig) -> Decoder:
    """The sizes that a config states: keys and values are cached for each head that has its own."""
    experts, latent = config.experts, config.latent
    inner = config.intermediate_size
    if experts is not None:
        routed = max(experts.used, experts.shared) * experts.size
        inner = routed if experts.first == 0 else max(inner, routed)
    cached = 2 * config.kv_heads * config.head_dim
    if latent is not None:
        cached = config.heads * (latent.nope + latent.rope + latent.value)
    small = latent.kv_rank + latent.rope if latent is not None else 0
    indexed = latent.indexer.size if latent is not None and latent.indexer is not None else 0
    hidden, context = config.hidden_size, config.context_length
    return Decoder(hidden, inner, config.heads, cached, small, config.vocab_size, context, indexed)


def stored_specs(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]] | None = None) -> list[Spec]:
    """The decoder's tensors: those of a checkpoint with these `shapes`, or those that a config tells of.

    Of a config alone the optional ones are not there, and a head is where the config says that it is not the
    embedding. Raises CheckpointError for a class without a table, PlanError.
    """
    table = find_architecture(config.architecture).table
    if shapes is not None:
        return plan(table, config, shapes)
    return [
        spec
        for spec in expand(table, config)
        if not spec.row.optional
        and (not spec.row.when or getattr(config, spec.row.when))
        and not (spec.row.tied_to and config.tied)
    ]


def weights_of(specs: Iterable[Spec], size: Callable[[Spec], int], beside: int = 0) -> Weights:
    """The bytes of a decoder's tensors, each as `size` says."""
    sums: dict[int | str, int] = {}
    for spec in specs:
        place = spec.layer if spec.layer is not None else "embed" if spec.role == "embed" else "head"
        sums[place] = sums.get(place, 0) + size(spec)
    layers = sorted(place for place in sums if isinstance(place, int))
    tied = all(spec.role != "head" for spec in specs)
    return Weights(sums.get("embed", 0), tuple(sums[i] for i in layers), sums.get("head", 0), beside, tied)
