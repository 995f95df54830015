"""Opens a checkpoint: a model folder, a weight file, the embedded sample, a hub id. Maps, never loads.

Weights are safetensors or pytorch_model.bin, one file or shards with an index; where both kinds are there,
safetensors win. Everything is checked before the first weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.config import load_json
from dsconvert.errors import CheckpointError
from dsconvert.locate import SAMPLE, SAMPLE_VL, locate
from dsconvert.reading import INDEX, read_object
from dsconvert.safetensors_header import READABLE, Array, Stored, quoted, read_safetensors, unique_keys
from dsconvert.torch_pickle import read_torch

SHARD = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})")
# Files beside the model that are not the model: adapters, original formats, training state.
ASIDE = re.compile(r"(adapter|consolidated|optimizer|scheduler|training|random_states).*")
# Endings of tensors that only quantized checkpoints have.
QUANTIZED = (".qweight", ".q_weight", ".qzeros", ".weight_scale_inv", ".weight_scale", ".weight_packed")


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


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk by its Hugging Face names: a WeightSource over mapped files.

    All methods may be called from many threads at once. The files stay mapped while a view of them lives.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, by name, without reading weights."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> str:
        """The stored type: "bf16", "f16", "f32", or another type's name ("f64", "i32", "f8_e4m3")."""
        return self._tensor(name).dtype

    def location(self, name: str) -> tuple[Path, int, int] | None:
        """File, first byte and number of bytes; None where the tensor is not in one piece."""
        tensor = self._tensor(name)
        return None if tensor.offset is None else (tensor.path, tensor.offset, tensor.nbytes)

    def raw(self, name: str) -> Array:
        """The stored values, without a copy: a read-only view of the mapped file in the stored shape.

        uint16 (the bits of bf16), float16 or float32. A view of an old file may be unaligned, one of a
        pytorch_model.bin may be strided: copy row chunks with `np.require(chunk, requirements=["C", "A"])`.
        Raises CheckpointError for any other stored type.
        """
        tensor = self._tensor(name)
        if tensor.data is None:
            raise _unreadable(name, tensor)
        return tensor.data

    def float32(self, name: str) -> npt.NDArray[np.float32]:
        """The values in float32, a fresh writable array of the stored shape; raises CheckpointError."""
        return _widened(self.raw(name))

    def float32_rows(self, name: str, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Rows `start` to `stop` - 1 in float32; only they are read."""
        return _widened(self.raw(name)[start:stop])

    def check_readable(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for the first of `names` whose stored type `raw` would refuse."""
        for name in names:
            tensor = self._tensor(name)
            if tensor.data is None:
                raise _unreadable(name, tensor)

    def _tensor(self, name: str) -> Stored:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"holds no tensor {quoted(name)}", where=self.folder) from None


def _widened(raw: Array) -> npt.NDArray[np.float32]:
    """Stored values as float32, a fresh array."""
    if raw.dtype != np.uint16:
        return np.array(raw, np.float32, order="C")
    bits = np.array(raw, np.uint32, order="C")
    bits <<= 16
    return bits.view(np.float32)


def open_checkpoint(model: str | Path | None = None) -> Checkpoint:
    """Open what the user named: a folder, a weight file, "sample:" or "sample-vl:", a hub id, or this folder.

    Maps every weight file and checks headers, index and shards against each other; reads no weights.
    Raises UsageError when `model` names nothing, CheckpointError for what is missing, damaged,
    contradictory or quantized already.
    """
    path = locate(model)
    folder = path if path.is_dir() else path.parent
    config = load_json(folder / "config.json")
    if path.is_dir():
        files, tensors = open_weights(folder)
    else:
        kind = TORCH if path.suffix == TORCH.suffix else SAFETENSORS
        files, tensors = (path,), kind.read(path)
    if model == SAMPLE_VL:  # it holds the towers; its decoder is the other sample's
        (shared,), decoder = open_weights(locate(SAMPLE))
        files = (*files, shared)
        tensors |= {re.sub(r"^model\.", "model.language_model.", name): t for name, t in decoder.items()}
    _refuse_quantized(folder, config, tensors)
    return Checkpoint(folder, files, tensors)


def open_weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, Stored]]:
    """The weight files of a folder and the tensors they hold, index and shards agreeing."""
    for kind in (SAFETENSORS, TORCH):
        if (folder / kind.single).exists():
            return (folder / kind.single,), kind.read(folder / kind.single)
        if (folder / kind.index).exists():
            return _open_index(folder, kind)
        names = _shard_set(folder, kind)
        if names:
            return _open_shards(folder, kind, names)
    raise _no_weights(folder)


def open_unindexed(folder: Path) -> tuple[tuple[Path, ...], dict[str, Stored]]:
    """Every safetensors file of a folder and the tensors they hold, complete if they are shards; no index.

    As exllamav2 reads a folder, where an index is often left from the model that it was made from.
    """
    names = _shard_set(folder, SAFETENSORS) or sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise _no_weights(folder)
    return _open_shards(folder, SAFETENSORS, names)


def _shard_set(folder: Path, kind: Kind) -> list[str]:
    """The shards of a folder without an index, complete and in order; empty when there are none."""
    names = [path.name for path in folder.glob("*" + kind.suffix) if not ASIDE.fullmatch(path.name)]
    sets: dict[tuple[str, int], dict[int, str]] = {}
    for name in names:
        match = SHARD.fullmatch(name.removesuffix(kind.suffix))
        if match:
            sets.setdefault((match[1], int(match[3])), {})[int(match[2])] = name
    if not sets:
        return names if len(names) == 1 and kind is SAFETENSORS else []
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


def _open_index(folder: Path, kind: Kind) -> tuple[tuple[Path, ...], dict[str, Stored]]:
    """The shards that an index names; index and shards must hold the same tensors."""
    path = folder / kind.index
    weight_map = _weight_map(path, kind)
    files, tensors = _open_shards(folder, kind, sorted(set(weight_map.values())))
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            actual = f"{tensors[name].path.name} holds it" if name in tensors else "no shard holds it"
            raise _disagree(path, f"It puts {quoted(name)} into {quoted(shard)}, but {actual}")
    extra = [name for name in tensors if name not in weight_map]
    if extra:
        where = tensors[extra[0]].path.name
        raise _disagree(path, f"It does not name {quoted(extra[0])}, which {quoted(where)} holds")
    return files, tensors


def _open_shards(folder: Path, kind: Kind, names: list[str]) -> tuple[tuple[Path, ...], dict[str, Stored]]:
    tensors: dict[str, Stored] = {}
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} weight files are missing",
            where=folder,
            why=f"The first is {quoted(missing[0])}",
            hint="Download the missing files",
        )
    for name in names:
        for tensor, stored in kind.read(folder / name).items():
            if tensor in tensors:
                both = f"{quoted(tensors[tensor].path.name)} and {quoted(name)}"
                raise _disagree(folder, f"Tensor {quoted(tensor)} is in both {both}")
            tensors[tensor] = stored
    return tuple(folder / name for name in names), tensors


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
                "names a weight file that is no file of this folder",
                where=path,
                why=f"Tensor {quoted(name)} is said to be in {quoted(shard)}",
                hint="Do not use this checkpoint before you know where it comes from",
            )
    return weights


def _is_plain(name: str, kind: Kind) -> bool:
    plain = name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
    return plain and name.endswith(kind.suffix) and len(name.encode()) <= 255


def _disagree(where: Path, why: str) -> CheckpointError:
    hint = "Index and shards are not of the same model, or a download is incomplete; fetch both again"
    return CheckpointError("does not agree with the weight files", where=where, why=why, hint=hint)


def _no_weights(folder: Path) -> CheckpointError:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    odd = [name for name in names if name.endswith((".gguf", ".safetensors", ".bin", ".pth", ".pt", ".h5"))]
    return CheckpointError(
        "holds no weights",
        where=folder,
        why=f"Found only {', '.join(map(quoted, odd[:3]))}" if odd else "",
        hint=f"Expected {SAFETENSORS.single} or {TORCH.single}, or their shards with an index",
    )


def _refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    parts = [config, *(config.get(key) for key in ("text_config", "language_config"))]
    stated = [p["quantization_config"] for p in parts if isinstance(p, dict) and p.get("quantization_config")]
    name = next((name for name in tensors if name.endswith(QUANTIZED)), "")
    if not stated and not name:
        return
    method = stated[0].get("quant_method", "unnamed") if stated and isinstance(stated[0], dict) else "unnamed"
    raise CheckpointError(
        "is quantized already",
        where=folder,
        why=f"config.json has a quantization_config, method {quoted(method)}"
        if stated
        else f"It holds {quoted(name)}",
        hint="Convert the 16-bit checkpoint that it was made from: each quantization loses",
    )


def _unreadable(name: str, tensor: Stored) -> CheckpointError:
    return CheckpointError(
        f"tensor {quoted(name)} is stored as {tensor.dtype}, which is not converted",
        where=tensor.path,
        why=f"Weights are read from {', '.join(READABLE)}",
        hint="Save the checkpoint in one of these first, for example with "
        "model.to(torch.bfloat16).save_pretrained(FOLDER)",
    )
