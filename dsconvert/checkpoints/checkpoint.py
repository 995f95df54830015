"""Opens a checkpoint: a model folder, a weight file, the embedded sample, a hub id. Maps, never loads.

Everything is checked before the first weight is read. Whatever form a checkpoint has, it comes out of this
door in one: names of the table, tensors that the model reads, notes on what was changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.checkpoints import bus_error, fp8
from dsconvert.checkpoints.further_layers import without_further_layers
from dsconvert.checkpoints.locate import SAMPLE, SAMPLE_VL, Model, find, locate
from dsconvert.checkpoints.rounding import nearest
from dsconvert.checkpoints.safetensors_reader import READABLE, Stored
from dsconvert.checkpoints.source_files import SourceFile, remember, small_files, weight_files
from dsconvert.checkpoints.spelling import LEFTOVERS, respelled
from dsconvert.checkpoints.weight_files import Weights, open_file, open_weights
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.architectures import check_known
from dsconvert.models.config import ModelConfig, is_tied, load_json, normalise
from dsconvert.models.diagnosis import SOURCE, is_left_over, quantized_form, stated_method
from dsconvert.models.model_class import model_class
from dsconvert.models.weights import Array, Floats, widened

if TYPE_CHECKING:
    from dsconvert.checkpoints.remote_model import RemoteModel


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model on disk by its Hugging Face names: a WeightSource over mapped files.

    `notes` are what the user should know of how it was found and read; every command shows them.
    All methods may be called from many threads at once. The files stay mapped while a view of them lives;
    `seen` says what they, and the small files beside them, were before they were opened.
    `stated` is config.json as it was read, once. With `remote` the files are on the hub, and are read there.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored] = field(repr=False)
    notes: tuple[str, ...] = field(repr=False, default=())
    seen: tuple[SourceFile, ...] = field(repr=False, default=())
    stated: dict[str, Any] = field(repr=False, default_factory=dict)
    remote: RemoteModel | None = field(repr=False, default=None)

    @cached_property
    def config(self) -> ModelConfig:
        """What config.json means; raises CheckpointError."""
        return normalise(self.stated, self.folder / "config.json")

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

    def rows(self, name: str, start: int, stop: int) -> Array:
        """Rows `start` to `stop` - 1: the bits of bf16, uint16, or float32, whatever is stored.

        bf16 and f32 come as a read-only view of the mapped file, or as a copy where its bytes lie apart; f16
        is widened and f64 rounded. A scalar is one row. Raises CheckpointError for a type that is not read.
        """
        tensor = self._tensor(name)
        if not tensor.readable:
            raise _unreadable(name, tensor)
        return tensor.rows(start, stop)

    def float32(self, name: str) -> Floats:
        """The values in float32, a fresh writable array of the stored shape; raises CheckpointError."""
        shape = self._tensor(name).shape
        values = widened(self.rows(name, 0, shape[0] if shape else 1)).reshape(shape)
        return values if values.flags.writeable else values.copy()

    def nearest(self, name: str, start: int, rows: Floats) -> Floats | None:
        """What storing float32 rows as the tensor `name` is stored makes of them, rounded to nearest."""
        return nearest(rows, self._tensor(name).dtype)

    def check_readable(self, names: Iterable[str]) -> None:
        """Raise CheckpointError for the first of `names` whose stored type `rows` would refuse."""
        for name in names:
            tensor = self._tensor(name)
            if not tensor.readable:
                raise _unreadable(name, tensor)

    def _tensor(self, name: str) -> Stored:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"holds no tensor {quoted(name)}", where=self.folder) from None


def open_checkpoint(model: Model = None) -> Checkpoint:
    """Open what the user named: a folder, a weight file, an embedded sample, a hub id, or this folder.

    What is on the hub is downloaded, or read where it is, as a ModelPath says. Maps every weight file and
    checks headers, index and shards against each other; reads no weights. The
    tensors have the names of their class's table, whatever wrapper they were saved from, and those that the
    model reads only; `notes` say what was changed. Raises UsageError when `model` names nothing,
    CheckpointError for what is missing, damaged, contradictory or quantized already.

    >>> checkpoint = open_checkpoint("sample:")
    >>> checkpoint.tensors["lm_head.weight"].shape, checkpoint.dtype("lm_head.weight")
    ((2048, 256), 'bf16')
    """
    found = find(model)
    folder = found.path if found.path.is_dir() else found.path.parent
    bus_error.watch()
    before = remember([*small_files(folder), *weight_files(folder)])
    where = folder / "config.json"
    config = load_json(where)
    named = model_class(config)
    check_known(named.name, where)
    remote, elsewhere = found.remote, found.remote.weights if found.remote is not None else None
    weights = open_weights(folder, elsewhere) if found.path.is_dir() else open_file(found.path)
    if str(model) == SAMPLE_VL:  # it holds the towers; its decoder is the other sample's
        decoder = open_weights(locate(SAMPLE))
        moved = {re.sub(r"^model\.", "model.language_model.", n): t for n, t in decoder.tensors.items()}
        weights = Weights((*weights.files, *decoder.files), weights.tensors | moved)
    weights = weights._replace(tensors=fp8.decoded(weights.tensors, config, where))
    left_over = _refuse_quantized(folder, config, weights.tensors)
    tensors, respelt = respelled(weights.tensors, named.name, is_tied(config, named.name), folder)
    tensors, further = without_further_layers(tensors, config)
    notes = (*found.notes, *weights.notes, *left_over, *named.notes, *respelt, *further)
    used = {*small_files(folder), *weights.files}
    seen = tuple(file for file in before if file.path in used)
    seen += () if remote is None else (remote.state,)
    return Checkpoint(folder, weights.files, tensors, notes, seen, config, remote)


def _refuse_quantized(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]
) -> tuple[str, ...]:
    """A note where config.json states a quantization that the weights have not; raises CheckpointError."""
    dtypes = {name: t.dtype for name, t in tensors.items() if not LEFTOVERS.fullmatch(name)}
    method, found = stated_method(config), quantized_form(dtypes)
    if found is None and (not method or fp8.NAME in dtypes.values()):
        return ()
    if found is None and is_left_over(method, dtypes):
        types = " and ".join(sorted(set(dtypes.values())))
        return (
            f"config.json states the quantization {quoted(method)}, but every tensor is {types}: taken for a "
            "left-over of the training, and ignored",
        )
    name, form = found or ("", None)
    stated = f"config.json has a quantization_config, method {quoted(method)}" if method else ""
    held = f"It holds {quoted(name)}, as {form.what} checkpoints do" if form else ""
    raise CheckpointError(
        "is quantized already",
        where=folder,
        why=". ".join(filter(None, (stated, held))),
        hint=form.hint if form else SOURCE,
    )


def _unreadable(name: str, tensor: Stored) -> CheckpointError:
    return CheckpointError(
        f"tensor {quoted(name)} is stored as {tensor.dtype}, which is not converted",
        where=tensor.path,
        why=f"Weights are read from {', '.join(READABLE)}",
        hint="Save the checkpoint in one of these first, for example with "
        "model.to(torch.bfloat16).save_pretrained(FOLDER)",
    )
