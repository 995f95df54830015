"""The weight files of a model folder: one file, or shards with or without their index.

Safetensors or pytorch_model.bin; where both kinds are complete, safetensors win. Index and shards are held
against each other before the first weight is read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsconvert.checkpoints.safetensors_header import unique_keys
from dsconvert.checkpoints.safetensors_reader import Stored, read_safetensors
from dsconvert.checkpoints.spelling import may_be_absent
from dsconvert.checkpoints.torch_bin import read_torch
from dsconvert.errors import CheckpointError, quoted
from dsconvert.reading import INDEX, read_object

AT_ONCE = 8  # files elsewhere whose headers are asked for together
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


Read = Callable[[Path], dict[str, Stored]]


@dataclass(frozen=True)
class Shelf:
    """The weight files of a model: those in its folder, or those that `elsewhere` reads, by their names.

    Such a file's path is where it would be in the folder. What is beside the weights is in the folder.
    """

    folder: Path
    elsewhere: Mapping[str, Read] | None = None

    def names(self) -> list[str]:
        """The names of all files, weights or not, in order."""
        inside = [path.name for path in self.folder.iterdir()]
        return sorted({*inside, *(self.elsewhere or ())})

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return os.path.exists(self.folder / name) or name in (self.elsewhere or ())

    def read(self, kind: Kind, names: Sequence[str]) -> list[dict[str, Stored]]:
        """The tensors of each of these files, which are there."""
        paths = [self.folder / name for name in names]
        if self.elsewhere is None:
            return [kind.read(path) for path in paths]
        with ThreadPoolExecutor(AT_ONCE) as pool:  # each is a question or two, and waits for the answers
            return list(pool.map(lambda path: (self.elsewhere or {})[path.name](path), paths))


class Choice(NamedTuple):
    """Which of a model's files are its weights, the index that says so, and the indexes passed over."""

    kind: Kind
    names: tuple[str, ...]
    weight_map: dict[str, str] | None = None
    stale: tuple[Path, ...] = ()


def open_weights(folder: Path, elsewhere: Mapping[str, Read] | None = None) -> Weights:
    """The weight files of a model and the tensors they hold, index and shards agreeing; see Shelf.

    An index none of whose shards is there came without its weights: the next complete set is taken, with a
    note. Raises CheckpointError.
    """
    shelf = Shelf(folder, elsewhere)
    choice = choose(shelf)
    if choice.weight_map is None:
        found = _open_shards(shelf, choice.kind, choice.names)
    else:
        found = _open_index(shelf, choice.kind, choice.weight_map)
    passed_over = tuple(_passed_over(index, found) for index in choice.stale)
    return found._replace(notes=(*passed_over, *found.notes))


def choose(shelf: Shelf) -> Choice:
    """The files that `open_weights` reads; of weights, nothing is read for it. Raises CheckpointError."""
    stale: list[tuple[Path, list[str]]] = []
    for kind in (SAFETENSORS, TORCH):
        index = shelf.folder / kind.index
        weight_map, names = None, list[str]()
        if shelf.has(kind.single):
            names = [kind.single]
        elif os.path.exists(index):
            weight_map = _weight_map(index, kind)
            names = sorted(set(weight_map.values()))
            if not any(map(shelf.has, names)):
                stale.append((index, names))
                weight_map, names = None, []
        names = names or _shard_set(shelf, kind, numbered=bool(stale))
        if names:
            return Choice(kind, tuple(names), weight_map, tuple(index for index, _ in stale))
    if stale:
        raise _missing(shelf.folder, stale[0][1], stale[0][1])
    raise _no_weights(shelf)


def open_file(path: Path) -> Weights:
    """One weight file, whose ending says what it is."""
    kind = TORCH if path.suffix == TORCH.suffix else SAFETENSORS
    return Weights((path,), kind.read(path))


def open_unindexed(folder: Path) -> Weights:
    """Every safetensors file of a folder and the tensors they hold, complete if they are shards; no index.

    As exllamav2 reads a folder, where an index is often left from the model that it was made from.
    """
    shelf = Shelf(folder)
    names = _shard_set(shelf, SAFETENSORS) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _no_weights(shelf)
    return _open_shards(shelf, SAFETENSORS, names)


def _passed_over(index: Path, found: Weights) -> str:
    several = f" and {len(found.files) - 1} more" if len(found.files) > 1 else ""
    return (
        f"{index.name} names weight files none of which is here; the weights are read from "
        f"{quoted(found.files[0].name)}{several}"
    )


def _shard_set(shelf: Shelf, kind: Kind, numbered: bool = False) -> list[str]:
    """The shards of a folder without an index, complete and in order; empty when there are none.

    Unless they must be `numbered`, safetensors files of any names will do.
    """
    names = [name for name in shelf.names() if name.endswith(kind.suffix) and not ASIDE.fullmatch(name)]
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
            where=shelf.folder,
            why=f"Found {several}",
            hint="Keep the shards of one model, or add its index",
        )
    ((_, total), shards) = next(iter(sets.items()))
    missing = [str(number) for number in range(1, min(total, 10**6) + 1) if number not in shards]
    if missing or len(shards) != total:
        raise CheckpointError(
            f"holds {len(shards)} shards of {total}",
            where=shelf.folder,
            why=f"Missing: number {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}",
            hint="Download the missing files",
        )
    return [shards[number] for number in sorted(shards)]


def _open_index(shelf: Shelf, kind: Kind, weight_map: dict[str, str]) -> Weights:
    """The shards that an index names; both must hold the same tensors, but for those that may be absent."""
    path = shelf.folder / kind.index
    found = _open_shards(shelf, kind, sorted(set(weight_map.values())))
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


def _open_shards(shelf: Shelf, kind: Kind, names: Sequence[str]) -> Weights:
    tensors: dict[str, Stored] = {}
    missing = [name for name in names if not shelf.has(name)]
    if missing:
        raise _missing(shelf.folder, names, missing)
    for name, held in zip(names, shelf.read(kind, names), strict=True):
        for tensor, stored in held.items():
            if tensor in tensors:
                both = f"{quoted(tensors[tensor].path.name)} and {quoted(name)}"
                raise _disagree(shelf.folder, f"Tensor {quoted(tensor)} is in both {both}")
            tensors[tensor] = stored
    return Weights(tuple(shelf.folder / name for name in names), tensors)


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


def _missing(folder: Path, names: Sequence[str], missing: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(missing)} of {len(names)} weight files are missing",
        where=folder,
        why=f"The first is {quoted(missing[0])}",
        hint="Download the missing files",
    )


def _disagree(where: Path, why: str) -> CheckpointError:
    hint = "Index and shards are not of the same model, or a download is incomplete; fetch both again"
    return CheckpointError("does not agree with the weight files", where=where, why=why, hint=hint)


def _no_weights(shelf: Shelf) -> CheckpointError:
    """What is there instead, and what makes weights of it."""
    folder, names = shelf.folder, shelf.names()
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
