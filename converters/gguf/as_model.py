"""A GGUF language model as a WeightSource: read back through the inverse of the architecture table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.gguf.parse import GGUFFile
from converters.gguf.qtypes import QTYPES, QType
from converters.gguf.rope import magnitude
from converters.gguf.rounding import nearest
from dsconvert.errors import CheckpointError
from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import BY_GGUF_NAME
from dsconvert.models.config import ModelConfig
from dsconvert.models.rope import RopeScaling
from dsconvert.models.stored_rows import by_source, source_rows, stored_rows
from dsconvert.models.tensor_table import HEADS_TURNED, Spec, fit_stored, plan_stored
from dsconvert.models.weights import Floats

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


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a WeightSource: tensors by their Hugging Face names through the inverse table."""

    file: GGUFFile
    architecture: Architecture
    config: ModelConfig
    specs: dict[str, tuple[Spec, ...]]  # the stored tensors that each is made of

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: specs[0].source for name, specs in self.specs.items()}

    def dtype(self, name: str) -> str:
        return min((self._qtype(spec) for spec in self.specs[name]), key=lambda qtype: qtype.bits).name

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return source_rows(self.specs[name], name, self._stored, start, stop)

    def float32(self, name: str) -> Floats:
        return self.rows(name, 0, self.specs[name][0].source[0])

    def _stored(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor of the file; of a vector values, [values, 1]."""
        tensor = self.file.tensors[name]
        return tensor.rows(start, stop) if len(tensor.shape) > 1 else tensor.rows(0, 1)[0, start:stop, None]

    def nearest(self, name: str, start: int, rows: Floats) -> Floats | None:
        """As WeightSource says; where the file has rows in several places, only whole heads are rounded."""
        specs, stop = self.specs[name], start + len(rows)
        if len(specs) == 1 and specs[0].row.transform is not HEADS_TURNED:
            return nearest(rows, self._qtype(specs[0]))
        height = specs[0].source[0] // specs[0].units
        whole = not specs[0].row.transform.units or not (start % height or stop % height)
        if not whole or any(self._qtype(spec).name not in QTYPES for spec in specs):
            return None
        named = {spec.gguf: spec for spec in specs}

        def rounded(gguf: str, first: int, end: int) -> Floats:
            stored = stored_rows(named[gguf], lambda name, a, b: rows[a - start : b - start], first, end)
            found = nearest(stored, self._qtype(named[gguf]))
            assert found is not None  # its type is written here, and its rows fill the type's blocks
            return found

        return source_rows(specs, name, rounded, start, stop)

    def _qtype(self, spec: Spec) -> QType:
        return self.file.tensors[spec.gguf].qtype


def open_model(file: GGUFFile) -> GGUFModel:
    """The weight source of a language model's file; raises CheckpointError, PlanError."""
    architecture, config = architecture_of(file), stored_config(file)
    shapes = {t.name: t.shape for t in file.tensors.values()}
    specs = plan_stored(architecture.table, config, shapes, architecture.derived(config))
    return GGUFModel(file, architecture, config, by_source(specs))


def open_parts(file: GGUFFile) -> tuple[GGUFModel, list[str]]:
    """As `open_model`, of a file that may lack tensors: what it has, and a sentence on each misfit.

    Raises CheckpointError.
    """
    architecture, config = architecture_of(file), stored_config(file)
    shapes = {t.name: t.shape for t in file.tensors.values()}
    specs, misfits = fit_stored(architecture.table, config, shapes, architecture.derived(config))
    return GGUFModel(file, architecture, config, by_source(specs)), misfits


def architecture_of(file: GGUFFile) -> Architecture:
    """The architecture that the file names; raises CheckpointError for another one."""
    name = file.keys.get("general.architecture")
    found = BY_GGUF_NAME.get(name) if isinstance(name, str) else None
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
    kv_heads = count("attention.head_count_kv", heads)
    head_dim = count("attention.key_length", max(hidden // heads, 1))
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
        layers=count("block_count", limit=len(file.tensors) + 1),
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
        explicit_head_dim=prefix + "attention.key_length" in file.keys,
    )


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
    original = numbers.count(context) if context in keys else None
    tensor = file.tensors.get("rope_freqs.weight")
    factors = () if tensor is None else tuple(tensor.float32().ravel().tolist())
    if factor == 1.0 and attention == 1.0 and not factors:
        return None
    return RopeScaling(kind, factor, original, attention_factor=attention, factors=factors)
