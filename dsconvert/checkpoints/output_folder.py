"""Writes a model folder: shards with their index, config.json, tokenizer and generation files.

The folder appears under its name only when it is complete: `<out>.part` is written, synced and renamed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.checkpoints import source_files
from dsconvert.checkpoints.marked_folders import model_folder
from dsconvert.checkpoints.output_files import sync_folder
from dsconvert.checkpoints.safetensors_writer import Piece, write_safetensors
from dsconvert.checkpoints.source_files import SourceFile, companions
from dsconvert.models.diagnosis import DECODER_KEYS
from dsconvert.models.model_class import default_of
from dsconvert.models.rope import ORIGINAL, SCALINGS, kind_of, settings

SHARD_BYTES = 4 << 30
# The key that old readers look for in rope_scaling, by its value; both keys at once are refused by some.
LEGACY_KEY = {"linear": "type", "yarn": "type", "dynamic": "type", "llama3": "rope_type"}

Done = Callable[[str, Piece], None]
EMPTY: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Naming:
    """How weight files are called: `stem`.safetensors, or numbered shards, which an `index` may list."""

    stem: str = "model"
    index: bool = True


HUB = Naming()


def write_folder(
    out: Path,
    source: Path,
    config: Mapping[str, Any],
    pieces: Mapping[str, Piece],
    settings: Mapping[str, Any],
    *,
    extra: Mapping[str, Mapping[str, Any] | str] = EMPTY,
    beside: Mapping[str, Mapping[str, Piece]] = EMPTY,
    naming: Naming = HUB,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    inputs: Sequence[Path] = (),
    seen: Iterable[SourceFile] = (),
    done: Done = lambda name, piece: None,
) -> int:
    """Write the folder `out`; returns the bytes of its weights.

    `config` is config.json of the output as the source has it, `settings` its quantization_config, `extra`
    further files by name, JSON or text, `pieces` every tensor in the order of the shards, `beside` more
    tensors by the folder inside `out` that takes them, `source` the folder whose tokenizer and generation
    files are copied, where `extra` has none of that name; `inputs` are what else the command reads, which is
    never replaced, and `seen` the source's files as they were when they were opened. Raises OutputError when
    `out` exists (without `force`), when there is no room, or when the disk refuses, CheckpointError when a
    file of the source has changed or leads elsewhere; nothing is left then.
    """
    everything = [*pieces.values(), *(piece for tensors in beside.values() for piece in tensors.values())]
    source_files.check_companions(source)
    nbytes = sum(piece.nbytes for piece in everything)
    with model_folder(out, nbytes, force, (source, *inputs)) as part:
        nbytes = _write_shards(part, pieces, naming, shard_bytes, done)
        for name, value in {"config.json": quantized_config(config, settings), **extra}.items():
            _write_text(part / name, value)
        for name, tensors in beside.items():
            (part / name).mkdir()
            nbytes += sum(piece.nbytes for piece in tensors.values())
            write_safetensors(part / name / "model.safetensors", tensors, done)
            sync_folder(part / name)
        for file in companions(source):
            if file.name not in extra:
                source_files.copy(file, part / file.name)
        source_files.check_unchanged(seen)
    return nbytes


def quantized_config(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the quantization settings and with RoPE in the new and in the old spelling."""
    out = with_both_ropes(config)
    out.pop("_name_or_path", None)
    for key in DECODER_KEYS:
        if isinstance(out.get(key), dict):
            out[key] = with_both_ropes(out[key])
    return {**out, "quantization_config": dict(settings)}


def with_both_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with `rope_parameters`, and `rope_theta` and `rope_scaling` that say the same.

    They say what transformers 5 takes from the source. Old readers see the latter only and take theta 10000
    and no scaling where they are absent. A part of a config without any RoPE key stays without.
    """
    out = copy.deepcopy(dict(config))
    if not any(out.get(key) is not None for key in ("rope_parameters", "rope_theta", "rope_scaling")):
        return out
    both = settings(out)[1]
    kind = kind_of(both) or "default"
    theta = both.pop("rope_theta", None) or out.get("rope_theta") or 10000.0
    for key in ("type", "rope_type"):
        both.pop(key, None)
    if kind in SCALINGS and out.get(ORIGINAL) is not None:  # only transformers 5 looks for it there
        both[ORIGINAL] = out[ORIGINAL]
    context = out.get("max_position_embeddings") or default_of(config, "max_position_embeddings")
    if kind == "llama3":  # transformers 4 takes no default for it
        both.setdefault(ORIGINAL, context)
    if kind == "yarn" and both.get("factor", 1.0) is None:  # nor for this
        both["factor"] = context / both.get(ORIGINAL, context)
    out["rope_theta"] = theta
    out["rope_scaling"] = None if kind == "default" else {LEGACY_KEY.get(kind, "rope_type"): kind, **both}
    out["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **both}
    return out


def plan_shards(pieces: Mapping[str, Piece], limit: int) -> list[list[str]]:
    """The tensor names of each shard: in order, at most `limit` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, piece in pieces.items():
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += piece.nbytes
    return shards


def _write_shards(folder: Path, pieces: Mapping[str, Piece], naming: Naming, limit: int, done: Done) -> int:
    """One file of weights, or several; returns the bytes of the tensors."""
    shards = plan_shards(pieces, limit)
    total = sum(piece.nbytes for piece in pieces.values())
    if len(shards) == 1:
        write_safetensors(folder / f"{naming.stem}.safetensors", pieces, done)
        return total
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{naming.stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {name: pieces[name] for name in names}, done)
        weight_map |= dict.fromkeys(names, file)
    if naming.index:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_text(folder / f"{naming.stem}.safetensors.index.json", index)
    return total


def _write_text(path: Path, value: Mapping[str, Any] | str) -> None:
    text = value if isinstance(value, str) else as_text(value)
    path.write_text(text, "utf-8")


def as_text(value: Mapping[str, Any]) -> str:
    """JSON as people read it; where a string holds half a surrogate pair, escaped as the source has it."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    return text + "\n"
