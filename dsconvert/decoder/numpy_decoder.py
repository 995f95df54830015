"""A decoder in numpy, of RMS norms and gated MLPs, for a proof that has to begin at once.

Importing torch and transformers takes longer than many a conversion. This is their arithmetic, in float32, on
the CPU, for a few blocks or a small model; `streaming` is for everything else, and the oracle of the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence

import numpy as np

from dsconvert.decoder.numpy_config import Floats, Numbers
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import plan
from dsconvert.models.weights import WeightSource

Names = tuple[str, ...]
Request = tuple[Names, Floats]  # matrices by module attribute without ".weight", and what they are applied to
Steps = Generator[Request, tuple[Floats, ...], Floats]
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def tensor_names(source: WeightSource, config: ModelConfig) -> tuple[tuple[dict[str, str], ...], str]:
    """Per layer module attribute -> tensor name, and the tensor of the output head (the embedding if tied).

    Experts' own matrices are left out (see `experts.expert_names`). Raises PlanError when tensors are
    missing, unknown or misshapen, CheckpointError for a class without a table.
    """
    architecture = find_architecture(config.architecture)
    blocks: list[dict[str, str]] = [{} for _ in range(config.layers)]
    names = set()
    for spec in plan(architecture.table, config, source.shapes()):
        names.add(spec.hf)
        if spec.layer is not None and "{e}" not in spec.hf:
            blocks[spec.layer][architecture.attributes(spec.hf.split(f".{spec.layer}.", 1)[1])] = spec.hf
    return tuple(blocks), HEAD if HEAD in names else EMBED


@np.errstate(over="ignore", invalid="ignore")
def norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """RMSNorm over the last axis."""
    scale: Floats = 1 / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + np.float32(eps))
    return x * scale * weight


@np.errstate(over="ignore", invalid="ignore")  # exp of a gate may be inf; what is broken shows in the result
def block(numbers: Numbers, weights: Mapping[str, Floats], x: Floats) -> Floats:
    """One decoder layer: states [n, length, d] to new states; `weights` by module attribute."""

    def products(names: Names, states: list[Floats]) -> list[tuple[Floats, ...]]:
        return [tuple(x @ weights[name + ".weight"].T for name in names) for x in states]

    (made,) = in_step([steps(numbers, weights, x)], products)
    return made


def steps(numbers: Numbers, vectors: Mapping[str, Floats], x: Floats) -> Steps:
    """`block` without its matrices: yields which of them to apply to what, and is sent the products.

    `vectors` are the norms and biases by module attribute, all of which is at hand while the matrices pass.
    """

    def linear(states: Floats, *names: str) -> Generator[Request, tuple[Floats, ...], list[Floats]]:
        products = yield names, states
        biases = [vectors.get(name + ".bias") for name in names]
        return [y if bias is None else y + bias for y, bias in zip(products, biases, strict=True)]

    states = norm(x, vectors["input_layernorm.weight"], numbers.norm_eps)
    projected = yield from linear(states, *(f"self_attn.{part}_proj" for part in "qkv"))
    q, k, v = (part.reshape(*x.shape[:2], -1, numbers.head_dim).swapaxes(1, 2) for part in projected)
    if (own := vectors.get("self_attn.q_norm.weight")) is not None:
        q, k = norm(q, own, numbers.norm_eps), norm(k, vectors["self_attn.k_norm.weight"], numbers.norm_eps)
    mixed = attention(*rotate(numbers, q, k), v).swapaxes(1, 2).reshape(*x.shape[:2], -1)
    x = x + (yield from linear(mixed, "self_attn.o_proj"))[0]
    states = norm(x, vectors["post_attention_layernorm.weight"], numbers.norm_eps)
    gate, up = yield from linear(states, "mlp.gate_proj", "mlp.up_proj")
    gate /= 1 + np.exp(-gate)
    return x + (yield from linear(gate * up, "mlp.down_proj"))[0]


def in_step(
    runs: Sequence[Steps], products: Callable[[Names, list[Floats]], Sequence[tuple[Floats, ...]]]
) -> list[Floats]:
    """Run the steps of one layer of several models side by side, each matrix asked for once for all.

    `products` returns each model's products of the named matrices with its own states.
    """
    asked, made = [next(run) for run in runs], list[Floats]()
    while not made:
        found = products(asked[0][0], [states for _, states in asked])
        asked = []
        for run, one in zip(runs, found, strict=True):
            try:
                asked.append(run.send(one))
            except StopIteration as end:
                made.append(end.value)
    return made


@np.errstate(over="ignore", invalid="ignore")
def logits(x: Floats, weight: Floats, head: Floats, eps: float) -> Floats:
    """Final norm and head [vocab, d]: states [tokens, d] to logits [tokens, vocab]."""
    found: Floats = norm(x, weight, eps) @ head.T
    return found


def rotate(numbers: Numbers, q: Floats, k: Floats) -> tuple[Floats, Floats]:
    """Queries and keys [n, heads, length, head_dim] turned by their positions."""
    angles, scale = numbers.angles, numbers.scale
    turns = np.outer(np.arange(q.shape[2], dtype=np.float32), angles)
    cos, sin = np.cos(turns) * np.float32(scale), np.sin(turns) * np.float32(scale)
    half = len(angles)

    def turned(x: Floats) -> Floats:
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    return turned(q), turned(k)


def attention(q: Floats, k: Floats, v: Floats) -> Floats:
    """Causal attention of q [n, heads, length, head_dim] over k and v with as many or fewer heads."""
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) / np.float32(math.sqrt(q.shape[-1]))
    scores += np.triu(np.full(scores.shape[2:], -np.inf, np.float32), 1)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    shares: Floats = scores / scores.sum(-1, keepdims=True)
    return shares @ v
