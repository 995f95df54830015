"""How much of two models is run in a proof: a rule of sizes and free memory, the same in every command."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsconvert.decoder.experts import LARGE
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import expand
from dsconvert.texts.windows import Windows

# What two cores do in a second: floating-point operations, and weights read and compared on one side. Fixed,
# since a proof that is made again, on whatever machine, should be the same proof.
FLOPS, READS = 90e9, 0.4e9
QUICK_SECONDS = 3.0  # what running all of a model may take by that estimate in a quick proof
SHORT, SAMPLE = 128, 32  # tokens where the windows asked for take too long: all blocks, some blocks
ONE_IN = 16  # of the blocks of a model that is too big for a quick proof
BLOCK_BYTES = 8  # of memory per weight of a block: two models in float32, of large matrices one


@dataclass(frozen=True)
class Effort:
    """What to run: over all blocks when `blocks` is None, else those; `text` says it and why.

    `small` is set where running all of it takes no time to speak of.
    """

    windows: Windows
    blocks: tuple[int, ...] | None
    text: str
    small: bool = False


def choose(
    config: ModelConfig, windows: Windows, mode: Literal["quick", "full"], free: float = float("inf")
) -> Effort:
    """Size a comparison: "full" runs everything; "quick" what takes some seconds by a fixed estimate.

    That is all of a small model, all blocks over one short window of a middle one, one block in ONE_IN of a
    big one, each on the reference's input; no block where two do not fit into half of `free` bytes of memory.
    """
    if seconds(config, windows) <= QUICK_SECONDS:
        return whole(config, windows, small=True)
    if mode == "full":
        return whole(config, windows)
    needed = BLOCK_BYTES * block_weights(config)
    short = cut(windows, SAMPLE)
    if needed > free / 2:
        text = f"two decoder blocks need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        return Effort(short, (), f"some rows of every tensor, no blocks and no logits: {text}; {ALL_OF_IT}")
    if seconds(config, cut(windows, SHORT)) <= QUICK_SECONDS:
        return whole(config, cut(windows, SHORT), small=True)
    blocks = spread(config.layers)[: max(1, config.layers // ONE_IN)]
    numbers = ("block " if len(blocks) == 1 else "blocks ") + ", ".join(map(str, blocks))
    text = f"{numbers} of {config.layers} on {short.length} tokens, on the reference's input, and no logits"
    return Effort(short, blocks, f"{text}; {ALL_OF_IT}")


ALL_OF_IT = "--effort full runs all of it"


def whole(config: ModelConfig, windows: Windows, small: bool = False) -> Effort:
    """All blocks over these windows."""
    n, length = windows.tokens.shape
    what = "1 window" if n == 1 else f"{n} windows"
    return Effort(windows, None, f"all {config.layers} blocks over {what} of {length} tokens", small)


def cut(windows: Windows, length: int) -> Windows:
    """The beginning of the first window, every prediction scored."""
    return Windows(windows.tokens[:1, :length], np.zeros(1, np.int64))


def spread(layers: int) -> tuple[int, ...]:
    """Every layer, in an order whose beginnings are spread over the model: first, middle, last, quarters."""
    order, parts = [0, layers // 2, layers - 1], 4
    while len(set(order)) < layers:
        order += [layers * k // parts for k in range(1, parts, 2)]
        parts *= 2
    return tuple(dict.fromkeys(order))


def seconds(config: ModelConfig, windows: Windows) -> float:
    """What running both models and the foretold one, which is not read, takes by estimate."""
    n, length = len(windows.tokens), windows.length
    return 2 * weights(config) / READS + 3 * n * length * forward_flops(config, length) / FLOPS


def forward_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations per token of one forward pass over windows of `length` tokens."""
    dims, experts = config.dims, config.experts
    layers = (b.plain + b.expert * (experts.used if experts else 0) for b in blocks(config))
    return 2.0 * (sum(layers) + config.layers * dims["q"] * length + dims["d"] * dims["v"])


def weights(config: ModelConfig) -> int:
    """How many weights the decoder has; biases and norms are left out."""
    tables = 1 if config.tied else 2
    experts = config.experts.count if config.experts else 0
    return sum(b.plain + b.expert * experts for b in blocks(config)) + (
        tables * config.vocab_size * config.hidden_size
    )


def block_weights(config: ModelConfig) -> int:
    """How many weights of a decoder layer are in memory at once, at most.

    Of experts those of one, and of a large dense MLP one matrix, see `decoder.experts`.
    """
    mlp = config.dims["d"] * config.dims["ff"]
    dense = [b.plain - (2 * mlp if not b.expert and 3 * mlp > LARGE else 0) for b in blocks(config)]
    return max(held + b.expert for held, b in zip(dense, blocks(config), strict=True))


@dataclass(frozen=True)
class BlockSize:
    """How many weights the matrices of a decoder layer have: each `expert`, and the `plain` rest."""

    plain: int
    expert: int


def blocks(config: ModelConfig) -> list[BlockSize]:
    """The size of every layer, by its architecture's table."""
    sizes = [[0, 0] for _ in range(config.layers)]
    for spec in expand(find_architecture(config.architecture).table, config):
        if spec.layer is not None and len(spec.shape) > 1:
            sizes[spec.layer]["{e}" in spec.hf] += spec.values // spec.many
    return [BlockSize(*pair) for pair in sizes]
