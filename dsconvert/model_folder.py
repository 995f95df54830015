"""Writes a model folder: shards with their index, config.json, tokenizer and generation files.

The folder appears under its name only when it is complete: `<out>.part` is written, synced and renamed.
"""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.config import LLAMA_DEFAULTS
from dsconvert.errors import OutputError
from dsconvert.rope import ORIGINAL, SCALINGS, kind_of, settings
from dsconvert.safetensors_writer import Piece, write_safetensors

SHARD_BYTES = 4 << 30
# What travels with the weights, as patterns of file names.
COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*.j*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE*",
)
NESTED = ("text_config", "language_config")
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
    done: Done = lambda name, piece: None,
) -> int:
    """Write the folder `out`; gives the bytes of its weights.

    `config` is config.json of the output as the source has it, `settings` its quantization_config, `extra`
    further files by name, JSON or text, `pieces` every tensor in the order of the shards, `beside` more
    tensors by the folder inside `out` that takes them, `source` the folder whose tokenizer and generation
    files are copied, where `extra` has none of that name. Raises OutputError when `out` exists (without
    `force`), when there is no room, or when the disk refuses; nothing is left then.
    """
    everything = [*pieces.values(), *(piece for tensors in beside.values() for piece in tensors.values())]
    with _folder(out, sum(piece.nbytes for piece in everything), force) as part:
        nbytes = _write_shards(part, pieces, naming, shard_bytes, done)
        for name, value in {"config.json": quantized_config(config, settings), **extra}.items():
            _write_text(part / name, value)
        for name, tensors in beside.items():
            (part / name).mkdir()
            nbytes += sum(piece.nbytes for piece in tensors.values())
            write_safetensors(part / name / "model.safetensors", tensors, done)
            _sync(part / name)
        for file in companions(source):
            if file.name not in extra:
                shutil.copyfile(file, part / file.name)
    return nbytes


def quantized_config(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the quantization settings and with RoPE in the new and in the old spelling."""
    out = with_both_ropes(config)
    out.pop("_name_or_path", None)
    for key in NESTED:
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
    context = out.get("max_position_embeddings") or LLAMA_DEFAULTS["max_position_embeddings"]
    if kind == "llama3":  # transformers 4 takes no default for it
        both.setdefault(ORIGINAL, context)
    if kind == "yarn" and both.get("factor", 1.0) is None:  # nor for this
        both["factor"] = context / both.get(ORIGINAL, context)
    out["rope_theta"] = theta
    out["rope_scaling"] = None if kind == "default" else {LEGACY_KEY.get(kind, "rope_type"): kind, **both}
    out["rope_parameters"] = {"rope_theta": theta, "rope_type": kind, **both}
    return out


def companions(source: Path) -> list[Path]:
    """The files of the source folder that travel with the weights, in order of their names."""
    found = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    return sorted(found)


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
    """One file of weights, or several; gives the bytes of the tensors."""
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


@contextmanager
def _folder(out: Path, nbytes: int, force: bool) -> Iterator[Path]:
    """An empty `<out>.part` that becomes `out` on success and is removed on failure."""
    check_target(out, nbytes, force)
    part = out.with_name(out.name + ".part")
    lock = _claim(part)
    try:
        yield part
        for file in part.iterdir():
            _sync(file)
        _sync(part)
        _publish(part, out)
    except OSError as error:
        raise OutputError("cannot be written", where=out, why=error.strerror or str(error)) from error
    finally:
        if part.exists():
            shutil.rmtree(part, ignore_errors=True)
        os.close(lock)


def check_target(out: Path, nbytes: int, force: bool) -> None:
    if not out.parent.is_dir():
        raise OutputError("the folder does not exist", where=out.parent, hint=f"mkdir -p {out.parent}")
    if out.exists() and not force and not (out.is_dir() and not any(out.iterdir())):
        raise OutputError("exists already", where=out, hint="Give --force to replace it")
    # --force replaces a model, not whatever else was named by mistake.
    if out.exists() and not (out.is_dir() and ((out / "config.json").exists() or not any(out.iterdir()))):
        raise OutputError("is no model folder", where=out, hint="Give --out another name, or remove it")
    free = shutil.disk_usage(out.parent).free
    if nbytes > free:
        raise OutputError(
            f"needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            where=out.parent,
            hint="Free some space, or choose another --out",
        )


def _claim(part: Path) -> int:
    """Make `part` anew, locked against another process that writes it; gives the lock's descriptor."""
    try:
        part.mkdir(exist_ok=True)
        lock = os.open(part, os.O_RDONLY)
    except OSError as error:
        raise OutputError("cannot be written", where=part, why=error.strerror or str(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for left in part.iterdir():  # of a run that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    except OSError as error:
        os.close(lock)
        busy = isinstance(error, BlockingIOError)
        raise OutputError(
            "is being written by another process" if busy else "holds something that cannot be removed",
            where=part,
            why="" if busy else error.strerror or str(error),
            hint="Wait for it, or choose another --out" if busy else "Remove it by hand",
        ) from None
    return lock


def _publish(part: Path, out: Path) -> None:
    """Rename `part` to `out`; what `out` was is kept aside until then."""
    aside = out.with_name(out.name + ".part-replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        os.replace(out, aside)
    try:
        os.replace(part, out)
    except OSError:
        if aside.exists():
            os.replace(aside, out)
        raise
    _sync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what file systems say that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _write_text(path: Path, value: Mapping[str, Any] | str) -> None:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    path.write_text(text, "utf-8")
