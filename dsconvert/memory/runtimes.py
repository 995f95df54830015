"""The runtimes that the memory table speaks of, as numbers: what each keeps besides weights and cache.

docs/memory.md explains every number, and says which were fitted to what.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsconvert.errors import UsageError

GIB = 1 << 30
MIB = 1 << 20


@dataclass(frozen=True)
class Runtime:
    """How a program runs a decoder, in bytes per value of what is alive at the peak of a moment.

    `at_once` is how many tokens run through a block together, of all sequences; 0: all of them. A value of a
    running token's state takes `states` bytes at any moment. On top of that come, in a block's attention,
    `keys` bytes for a value of its keys and values and `scores` for an attention score (0: attention is
    fused, and no scores are kept); in its MLP, `inner` bytes for an inner value; at the head, `logits` bytes
    for a logit, of `every_logit` position that runs or of the last of each sequence. `mask` bytes go to each
    pair of a running token and one that it may see. `fixed` bytes are the program's own on each card.
    `embedding` says whether cards hold the embedding; else host memory does. `caches` are the types that
    the cache may have, the usual one first. With `latent` the cache holds latent attention's own vectors, and
    not the keys and values that are made of them. One that is not `on_card` has all of it in host memory.
    One that is `bare` was never measured: weights and cache are all that is counted of it.
    """

    name: str
    at_once: int
    states: int
    keys: int
    scores: int
    inner: int
    logits: int
    every_logit: bool
    mask: int
    fixed: int
    caches: tuple[str, ...]
    embedding: bool = True
    latent: bool = False
    on_card: bool = True
    bare: bool = False


# Bits per value of a cache's type, with its scales: ggml's blocks of 32, exllamav2's.
CACHE_BITS = {
    "f32": 32.0,
    "f16": 16.0,
    "bf16": 16.0,
    "q8_0": 8.5,
    "q5_1": 6.0,
    "q5_0": 5.5,
    "q4_1": 5.0,
    "q4_0": 4.5,
    "iq4_nl": 4.5,
}
_GGML = ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_HALF = ("bf16", "f16")
_TORCH = 410 * MIB  # cuBLAS' workspace and what the allocator rounds up to: fitted, see docs/memory.md

RUNTIMES = {
    one.name: one
    for one in (
        Runtime("eager", 0, 8, 2, 14, 6, 10, True, 0, _TORCH, _HALF),
        Runtime("transformers", 0, 8, 2, 0, 6, 6, False, 0, _TORCH, _HALF),
        Runtime("exllamav2", 2048, 8, 2, 0, 6, 6, False, 0, _TORCH, _HALF),
        Runtime("llama.cpp", 512, 20, 4, 0, 12, 4, True, 2, _TORCH, _GGML, embedding=False, latent=True),
        Runtime("llama.cpp-cpu", 512, 20, 4, 0, 12, 4, True, 2, 0, _GGML, latent=True, on_card=False),
        Runtime("vllm", 0, 0, 0, 0, 0, 0, False, 0, 0, _HALF, bare=True),
        Runtime("mlx", 0, 0, 0, 0, 0, 0, False, 0, 0, _HALF, bare=True),
    )
}


def cache_bits(runtime: Runtime, kind: str | None) -> float | None:
    """Bits per value of the runtime's cache in a type, None for its usual one; None where it has no such.

    Raises UsageError for a type that no runtime has.
    """
    if kind is not None and kind not in CACHE_BITS:
        raise UsageError(
            f"{kind[:40]!r} is no type of a cache", hint=f"Give --cache one of {', '.join(CACHE_BITS)}"
        )
    if kind is not None and kind not in runtime.caches:
        return None
    return CACHE_BITS[kind or runtime.caches[0]]
