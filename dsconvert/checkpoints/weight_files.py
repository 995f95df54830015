"""The weight files of a model folder: one file, or shards with or without their index.

Safetensors or pytorch_model.bin; where both kinds are complete, safetensors win. Index and shards are held
against each other before the first weight is read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsconvert.checkpoints.safetensors_reader import Stored, read_safetensors, unique_keys
from dsconvert.checkpoints.spelling import may_be_absent
from dsconvert.checkpoints.torch_bin import read_torch
from dsconvert.errors import CheckpointError, quoted
from dsconvert.reading import INDEX, read_object

SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})")
# Files beside the model that are not the model: adapters, original formats, training state.
ASIDE = re.compile(r"(adapter|consolidated|optimizer|scheduler|training|random_states).*")


@dataclass(frozen=True)
class Kind:
    """A kind of weight file: its single file, the ending of shards, who reads it."""

    single: str
    suffix: str
    read: Callable[[Path], dict[str, Stored]]

    @property
    def index(self) -> str:
        """The file that says which shard holds which tensor."""
        return self.single + ".index.json"


SAFETENSORS = Kind("model.safetensors", ".safetensors", read_safetensors)
TORCH = Kind("pytorch_model.bin", ".bin", read_torch)


class Weights(NamedTuple):
    """The files that were read, their tensors by stored name, and what the user should know about it."""

    files: tuple[Path, ...]
    tensors: dict[str, Stored]
    notes: tuple[str, ...] = ()


def open_weights(folder: Path) -> Weights:
    """The weight files of a folder and the tensors they hold, index and shards agreeing.

    An index none of whose shards is there came without its weights: the next complete set is taken, with a
    note. Raises CheckpointError.
    """
    stale: list[tuple[Path, list[str]]] = []
    for kind in (SAFETENSORS, TORCH):
        index, found = folder / kind.index, None
        if os.path.exists(folder / kind.single):
            found = Weights((folder / kind.single,), kind.read(folder / kind.single))
        elif os.path.exists(index):
            weight_map = _weight_map(index, kind)
            shards = sorted(set(weight_map.values()))
            if any(os.path.exists(folder / shard) for shard in shards):
                found = _open_index(folder, kind, weight_map)
            else:
                stale.append((index, shards))
        names = [] if found else _shard_set(folder, kind, numbered=bool(stale))
        if names:
            found = _open_shards(folder, kind, names)
        if found:
            return found._replace(notes=(*(_passed_over(i, found) for i, _ in stale), *found.notes))
    if stale:
        raise _missing(folder, stale[0][1], stale[0][1])
    raise _no_weights(folder)


def open_file(path: Path) -> Weights:
    """One weight file, whose ending says what it is."""
    kind = TORCH if path.suffix == TORCH.suffix else SAFETENSORS
    return Weights((path,), kind.read(path))


def open_unindexed(folder: Path) -> Weights:
    """Every safetensors file of a folder and the tensors they hold, complete if they are shards; no index.

    As exllamav2 reads a folder, where an index is often left from the model that it was made from.
    """
    names = _shard_set(folder, SAFETENSORS) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _no_weights(folder)
    return _open_shards(folder, SAFETENSORS, names)


def _passed_over(index: Path, found: Weights) -> str:
    several = f" and {len(found.files) - 1} more" if len(found.files) > 1 else ""
    return (
        f"{index.name} names weight files none of which is here; the weights are read from "
        f"{quoted(found.files[0].name)}{several}"
    )


def _shard_set(folder: Path, kind: Kind, numbered: bool = False) -> list[str]:
    """The shards of a folder without an index, complete and in order; empty when there are none.

    Unless they must be `numbered`, safetensors files of any names will do.
    """
    names = sorted(path.name for path in folder.glob("*" + kind.suffix) if not ASIDE.fullmatch(path.name))
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        match = SHARD.fullmatch(name.removesuffix(kind.suffix))
        if match:
            sets.setdefault((match[1], int(match[3])), {})[int(match[2])] = name
    if not sets:
        return names if kind is SAFETENSORS and not numbered else []
    if len(sets) > 1:
        several = ", ".join(sorted(quoted(next(iter(shards.values()))) for shards in sets.values())[:3])
        raise CheckpointError(
            "holds shards of more than one set",
            where=folder,
            why=f"Found {several}",
            hint="Keep the shards of one model, or add its index",
        )
    ((_, total), shards) = next(iter(sets.items()))
    missing = [str(number) for number in range(1, min(total, 10**6) + 1) if number not in shards]
    if missing or len(shards) != total:
        raise CheckpointError(
            f"holds {len(shards)} shards of {total}",
            where=folder,
            why=f"Missing: number {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}",
            hint="Download the missing files",
        )
    return [shards[number] for number in sorted(shards)]


def _open_index(folder: Path, kind: Kind, weight_map: dict[str, str]) -> Weights:
    """The shards that an index names; both must hold the same tensors, but for those that may be absent."""
    path = folder / kind.index
    found = _open_shards(folder, kind, sorted(set(weight_map.values())))
    tensors, absent = found.tensors, []
    for name, shard in weight_map.items():
        if name in tensors and tensors[name].path.name != shard:
            actual = f"{quoted(tensors[name].path.name)} holds it"
            raise _disagree(path, f"It puts {quoted(name)} into {quoted(shard)}, but {actual}")
        if name not in tensors and not may_be_absent(name):
            raise _disagree(path, f"It puts {quoted(name)} into {quoted(shard)}, but no shard holds it")
        absent += [] if name in tensors else [name]
    extra = [name for name in tensors if name not in weight_map and not may_be_absent(name)]
    if extra:
        where = tensors[extra[0]].path.name
        raise _disagree(path, f"It does not name {quoted(extra[0])}, which {quoted(where)} holds")
    named = ", ".join(map(quoted, absent[:3])) + (" and more" if len(absent) > 3 else "")
    return found._replace(notes=(f"{path.name} names {named}, which no shard holds",) if absent else ())


def _open_shards(folder: Path, kind: Kind, names: list[str]) -> Weights:
    tensors: dict[str, Stored] = {}
    missing = [name for name in names if not os.path.exists(folder / name)]
    if missing:
        raise _missing(folder, names, missing)
    for name in names:
        for tensor, stored in kind.read(folder / name).items():
            if tensor in tensors:
                both = f"{quoted(tensors[tensor].path.name)} and {quoted(name)}"
                raise _disagree(folder, f"Tensor {quoted(tensor)} is in both {both}")
            tensors[tensor] = stored
    return Weights(tuple(folder / name for name in names), tensors)


def _weight_map(path: Path, kind: Kind) -> dict[str, str]:
    """The index's map from tensor to shard; every shard is a plain file name of this folder.

    Symbolic links are followed: the hub's cache is made of them.
    """
    weights = read_object(path, INDEX, pairs=unique_keys).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise CheckpointError("has no weight_map", where=path, hint="Fetch the index again")
    for name, shard in weights.items():
        if not isinstance(shard, str) or not _is_plain(shard, kind):
            raise CheckpointError(
                "names a weight file that is not in this folder",
                where=path,
                why=f"Tensor {quoted(name)} is said to be in {quoted(shard)}",
                hint="Do not use this checkpoint before you know where it comes from",
            )
    return weights


def _is_plain(name: str, kind: Kind) -> bool:
    plain = name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
    return plain and name.endswith(kind.suffix) and len(name.encode()) <= 255


def _missing(folder: Path, names: list[str], missing: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(missing)} of {len(names)} weight files are missing",
        where=folder,
        why=f"The first is {quoted(missing[0])}",
        hint="Download the missing files",
    )


def _disagree(where: Path, why: str) -> CheckpointError:
    hint = "Index and shards are not of the same model, or a download is incomplete; fetch both again"
    return CheckpointError("does not agree with the weight files", where=where, why=why, hint=hint)


def _no_weights(folder: Path) -> CheckpointError:
    """What is there instead, and what makes weights of it."""
    names = sorted(path.name for path in folder.iterdir())
    odd = [name for name in names if name.endswith((".gguf", ".safetensors", ".bin", ".pth", ".pt", ".h5"))]
    place = shlex.quote(str(folder))
    made = {
        "holds FSDP's shards (.distcp) and no weights": (
            any(name.endswith(".distcp") for name in names),
            "Make one file of them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{place} {shlex.quote(str(folder / TORCH.single))}",
        ),
        "holds DeepSpeed's state and no weights": (
            "zero_to_fp32.py" in names,
            f"Make one file of it: python {shlex.quote(str(folder / 'zero_to_fp32.py'))} {place} {place}",
        ),
        "holds an adapter and no weights of a model": (
            any(name.startswith("adapter_") for name in names),
            "Merge it into its base first, with peft: merge_and_unload(), then save_pretrained(FOLDER)",
        ),
        "holds weights in Meta's original form": (
            any(name.startswith("consolidated.") for name in names),
            "Convert them first with transformers' convert_llama_weights_to_hf.py",
        ),
    }
    for what, (fits, hint) in made.items():
        if fits:
            return CheckpointError(what, where=folder, hint=hint)
    return CheckpointError(
        "holds no weights",
        where=folder,
        why=f"Found only {', '.join(map(quoted, odd[:3]))}" if odd else "",
        hint=f"Expected {SAFETENSORS.single} or {TORCH.single}, or their shards with an index",
    )
