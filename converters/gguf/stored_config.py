"""The numbers of a GGUF language model, as its own keys state them; a stranger may have written them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from converters.gguf.parse import GGUFFile
from converters.gguf.rope import LOG_MULTIPLIER, magnitude
from dsconvert.errors import CheckpointError
from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import BY_GGUF_NAME, stored_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.experts import GATINGS, SOFTMAX, Experts, Indexer, Latent
from dsconvert.models.rope import RopeScaling

LIMIT, GREATEST = 1 << 31, 1e30  # as in config.json
AGAIN = "Convert the model again, or fetch the file again from where it came from"


@dataclass(frozen=True)
class Numbers:
    """The numbers among a file's keys, which a stranger may have written: no other value gets through."""

    file: GGUFFile

    def count(self, key: str, default: int | None = None, limit: int = LIMIT) -> int:
        """A positive whole number below `limit`; CheckpointError for anything else, or a missing key."""
        value = self.file.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < limit:
            raise self.wrong(key, f"it should be a whole number from 1 to {limit - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number; CheckpointError for anything else, or a missing key."""
        value = self.file.keys.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < GREATEST:
            raise self.wrong(key, "it should be a positive number")
        return float(value)

    def wrong(self, key: str, why: str) -> CheckpointError:
        """The error of a key that is missing or holds what it cannot."""
        value = self.file.keys.get(key)
        found = "missing" if value is None else repr(value)[:40]
        return CheckpointError(f"key {key} is {found}", where=self.file.path, why=why, hint=AGAIN)


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture that the file names; raises CheckpointError for another one."""
    name = file.keys.get("general.architecture")
    found = stored_architecture(name, file.keys, file.tensors)
    if found is None:
        raise CheckpointError(
            f"architecture {name!r} has no table here",
            where=file.path,
            why=f"known: {', '.join(BY_GGUF_NAME)}",
        )
    return found


def stored_config(file: GGUFFile) -> ModelConfig:
    """The decoder's numbers as the file's own keys state them; raises CheckpointError for a missing key."""
    architecture = architecture_of(file)
    numbers, prefix = Numbers(file), f"{architecture.gguf}."

    def count(key: str, default: int | None = None, limit: int = LIMIT) -> int:
        return numbers.count(prefix + key, default, limit)

    def number(key: str, default: float | None = None) -> float:
        return numbers.number(prefix + key, default)

    hidden, heads = count("embedding_length"), count("attention.head_count")
    layers, latent = count("block_count", limit=len(file.tensors) + 1), stored_latent(numbers, prefix)
    kv_heads = heads if latent else count("attention.head_count_kv", heads)
    head_dim = latent.rope if latent else count("attention.key_length", max(hidden // heads, 1))
    if heads % kv_heads or head_dim % 2:
        raise numbers.wrong(
            prefix + ("attention.head_count_kv" if heads % kv_heads else "attention.key_length"),
            f"{kv_heads} heads of {head_dim} values go with no model of {heads} heads",
        )
    embedding = file.tensors.get("token_embd.weight")
    return ModelConfig(
        architecture=architecture.hf_class,
        hidden_size=hidden,
        intermediate_size=count("feed_forward_length"),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=embedding.shape[0] if embedding else count("vocab_size"),
        context_length=count("context_length"),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=number("rope.freq_base", 10000.0),
        rope_scaling=stored_scaling(file, prefix),
        tied="output.weight" not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        explicit_head_dim=not latent and prefix + "attention.key_length" in file.keys,
        experts=stored_experts(numbers, architecture, layers),
        latent=latent,
    )


def stored_latent(numbers: Numbers, prefix: str) -> Latent | None:
    """The widths of latent attention, None for a file without; raises CheckpointError."""
    keys, at = numbers.file.keys, prefix + "attention."
    if at + "kv_lora_rank" not in keys:
        return None
    if at + "key_length_mla" not in keys:
        raise CheckpointError(
            "holds latent attention in a form of before April 2025",
            where=numbers.file.path,
            why=f"It has no {at}key_length_mla: kv_b is one tensor there, and two in files of today",
            hint="Convert the checkpoint again: newer llama.cpp runs the new form faster and in less memory",
        )
    rank, rope = at + "q_lora_rank", numbers.count(prefix + "rope.dimension_count")
    key = numbers.count(at + "key_length_mla")
    if rope % 2 or key <= rope:
        raise numbers.wrong(prefix + "rope.dimension_count", f"RoPE turns some of a head's {key} values")
    return Latent(
        q_rank=numbers.count(rank) if rank in keys else None,
        kv_rank=numbers.count(at + "kv_lora_rank"),
        nope=key - rope,
        rope=rope,
        value=numbers.count(at + "value_length_mla"),
        indexer=stored_indexer(numbers, at + "indexer."),
    )


def stored_indexer(numbers: Numbers, at: str) -> Indexer | None:
    """The indexer of sparse attention, None for a file without; raises CheckpointError."""
    if at + "head_count" not in numbers.file.keys:
        return None
    return Indexer(*(numbers.count(at + key) for key in ("head_count", "key_length", "top_k")))


def stored_experts(numbers: Numbers, architecture: Architecture, layers: int) -> Experts | None:
    """How tokens go to experts, None for a file without; raises CheckpointError."""
    keys, tensors, prefix = numbers.file.keys, numbers.file.tensors, f"{architecture.gguf}."
    if not keys.get(prefix + "expert_count"):
        return None
    gatings = {number: name for name, number in GATINGS.items()}
    func = keys.get(prefix + "expert_gating_func", GATINGS[SOFTMAX])
    if func not in gatings:
        known = ", ".join(f"{number} ({name})" for number, name in gatings.items())
        raise numbers.wrong(prefix + "expert_gating_func", f"known: {known}")

    def whole(key: str, default: int) -> int:
        """As `count`, 0 for a key that is 0."""
        return 0 if keys.get(prefix + key, default) == 0 else numbers.count(prefix + key, default)

    found = Experts(
        count=numbers.count(prefix + "expert_count"),
        used=numbers.count(prefix + "expert_used_count"),
        size=numbers.count(prefix + "expert_feed_forward_length", keys.get(prefix + "feed_forward_length")),
        first=min(whole("leading_dense_block_count", 0), layers),
        shared=whole("expert_shared_count", 0),
        gating=gatings[func],
        bias=any(name.endswith(".exp_probs_b.bias") for name in tensors),
        groups=max(whole("expert_group_count", 1), 1),
        groups_used=max(whole("expert_group_used_count", 1), 1),
        normalised=keys.get(prefix + "expert_weights_norm") is True,
        scale=numbers.number(prefix + "expert_weights_scale", 1.0),
    )
    return replace(found, **architecture.runtime_experts)


def stored_scaling(file: GGUFFile, prefix: str) -> RopeScaling | None:
    """RoPE scaling as llama.cpp reads it from a file of this architecture; a key that it ignores is not read.

    Raises CheckpointError for a value that no file should have, or a type that is not read here.
    """
    keys, numbers, at = file.keys, Numbers(file), prefix + "rope.scaling."
    kind, context = keys.get(at + "type", "linear"), at + "original_context_length"
    if kind not in ("none", "linear", "yarn"):
        raise numbers.wrong(at + "type", "none, linear and yarn are read here")
    old = prefix + "rope.scale_linear"
    factor = numbers.number(at + "factor", numbers.number(old) if old in keys else 1.0)
    factor = 1.0 if kind == "none" else factor
    attention = numbers.number(at + "attn_factor", 1.0) * (magnitude(factor) if kind == "yarn" else 1.0)
    weight = None
    if prefix + "attention.kv_lora_rank" in keys:  # it scales the scores instead
        attention = 1.0
        weight = 10 * numbers.number(prefix + LOG_MULTIPLIER) if prefix + LOG_MULTIPLIER in keys else None
    original = numbers.count(context) if context in keys else None
    tensor = file.tensors.get("rope_freqs.weight")
    factors = () if tensor is None else tuple(tensor.float32().ravel().tolist())
    if factor == 1.0 and attention == 1.0 and not factors:
        return None
    return RopeScaling(
        kind, factor, original, attention_factor=attention, mscale_all_dim=weight, factors=factors
    )
