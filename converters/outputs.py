"""Opens what the user names: the checkpoint to compare with, and an output of any known format."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.checkpoints.locate import in_folder
from dsconvert.errors import CheckpointError, TokenizerError, UsageError
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import load_config, load_json
from dsconvert.models.diagnosis import stated_method
from dsconvert.models.language_model import language_model
from dsconvert.proof.result import TypeSize, sizes_by_type
from dsconvert.proof.sources import Opened, Reference, is_plain
from tokenizer_tools.identity import TextHandling, of_data, of_metadata
from tokenizer_tools.load import load_tokenizer

if TYPE_CHECKING:
    from converters.gguf.parse import GGUFFile


def open_reference(model: str, add_bos: bool | None = None) -> Reference:
    """The 16-bit checkpoint that `model` names, BOS before a text where `add_bos` or its files say so.

    Raises ConversionError of every kind that opening has.
    """
    from converters.gguf.projector.proof import Pictured
    from dsconvert.vision.plan import plan_towers, with_template

    checkpoint = open_checkpoint(model)
    config = load_config(checkpoint.folder)
    find_architecture(config.architecture, checkpoint.folder / "config.json")
    tokenizer = load_tokenizer(checkpoint.folder, config.vocab_size, add_bos)
    towers = plan_towers(checkpoint, config, tokenizer)
    templates, pictured = [tokenizer.chat.default], None
    if towers is not None:  # a GGUF file of it gets a template that takes pictures
        templates.append(with_template(tokenizer, towers).chat.default)
        pictured = Pictured(checkpoint, config, tokenizer, towers)
    source, config = language_model(checkpoint, config)
    notes = (*checkpoint.notes, *config.notes)
    return Reference(
        checkpoint.folder, source, config, tokenizer, tuple(templates), pictured, notes,
        checkpoint.seen, model or checkpoint.folder.name,
    )  # fmt: skip


def open_output(path: Path) -> Opened:
    """Recognise an output by what it is: a GGUF file, or a folder by its quantization_config.

    Raises UsageError for what is neither, and what the format's reader raises.
    """
    if os.path.isfile(path):  # Path.is_file raises where one may not look
        return _open_gguf(path)
    if not os.path.isdir(path):
        raise UsageError(
            "there is no such file or folder", where=path, hint="Give a GGUF file or a model folder"
        )
    path = in_folder(path).path
    method = stated_method(load_json(path / "config.json"))
    if not method or is_plain(path, method):
        return _open_checkpoint(path)
    if method not in OPENERS:
        raise UsageError(
            f"is quantized by a method that is not read here, {method[:40]!r}",
            where=path,
            why=f"known: GGUF files, 16-bit folders, {', '.join(OPENERS)}",
        )
    return OPENERS[method](path)


def _open_gguf(path: Path) -> Opened:
    from converters.gguf.as_model import open_model
    from converters.gguf.parse import open_gguf

    file = open_gguf(path)
    model = open_model(file)
    sizes = sizes_by_type((t.qtype.name, t.values, t.nbytes) for t in file.tensors.values())
    quant = stated_quant(file, sizes)
    nbytes = sum(part.stat().st_size for part in file.paths)
    text = _handling(lambda: of_metadata(file.keys))
    return Opened(path, "GGUF", quant, quant, model, model.config, text, sizes, nbytes, file.keys)


def _handling(opened: Callable[[], TextHandling]) -> TextHandling | TokenizerError:
    """What `opened` gives, or its error: an output without a usable tokenizer fails, it is no accident."""
    try:
        return opened()
    except TokenizerError as error:
        return error


def stated_quant(file: GGUFFile, sizes: tuple[TypeSize, ...]) -> str:
    """The mixture that the file says it is; where it says none that is known, its commonest type."""
    from converters.gguf.file_types import FILE_TYPES

    names = {number: name for name, number in FILE_TYPES.items()}
    stated = file.keys.get("general.file_type")
    return names.get(stated, _commonest(sizes)) if isinstance(stated, int) else _commonest(sizes)


def _open_checkpoint(path: Path) -> Opened:
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint.folder)
    sizes = _stored_sizes(checkpoint)
    source, decoder = language_model(checkpoint, config, checkpoint.folder / "config.json")
    quant = _commonest(sizes)
    text = _handling(lambda: of_data(load_tokenizer(checkpoint.folder, config.vocab_size)))
    return Opened(
        path, "checkpoint", quant, quant, source, decoder, text, sizes, checkpoint.nbytes,
        notes=checkpoint.notes,
    )  # fmt: skip


def _open_gptq(path: Path) -> Opened:
    from converters.gptq.pack import PARTS
    from converters.gptq.reader import open_model

    model = open_model(path)
    config = load_config(path)
    source, decoder = language_model(model, config, path / "config.json")
    bits = {f"{name}.weight": model.bits for name in model.linears}
    sizes = sizes_by_type(
        (model.dtype(name), prod(shape), _packed_nbytes(model.checkpoint, name, name in bits, PARTS))
        for name, shape in model.shapes().items()
    )
    quant = f"gptq-{model.bits}bit" + (f"-{model.group_size}g" if model.group_size > 0 else "")
    text = _handling(lambda: of_data(load_tokenizer(path, config.vocab_size)))
    return Opened(
        path, "GPTQ", quant, f"gptq{model.bits}", source, decoder, text, sizes, model.checkpoint.nbytes
    )


def _open_exl2(path: Path) -> Opened:
    from converters.exl2.pack import PARTS
    from converters.exl2.reader import open_model

    model = open_model(path)
    config = load_config(path)
    source, decoder = language_model(model, config, path / "config.json")
    packed = {f"{name}.weight" for name in model.linears}
    sizes = sizes_by_type(
        (model.dtype(name), prod(shape), _packed_nbytes(model.checkpoint, name, name in packed, PARTS))
        for name, shape in model.shapes().items()
    )
    head = model.linears.get("lm_head")
    quant = f"exl2-{model.bits:.2f}bpw-h{head.width if head else 16}"
    text = _handling(lambda: of_data(load_tokenizer(path, config.vocab_size)))
    return Opened(path, "EXL2", quant, model.limits, source, decoder, text, sizes, model.checkpoint.nbytes)


def _packed_nbytes(checkpoint: Checkpoint, name: str, quantized: bool, parts: tuple[str, ...]) -> int:
    """Bytes of a tensor as it is stored, of a quantized one in all its parts."""
    if not quantized:
        return checkpoint.tensors[name].nbytes
    stored = (checkpoint.tensors.get(name.removesuffix("weight") + part) for part in parts)
    return sum(part.nbytes for part in stored if part is not None)


# How folders are opened, by the quant_method of their quantization_config.
OPENERS: dict[str, Callable[[Path], Opened]] = {"gptq": _open_gptq, "exl2": _open_exl2}


def _stored_sizes(checkpoint: Checkpoint) -> tuple[TypeSize, ...]:
    return sizes_by_type((t.dtype, prod(t.shape), t.nbytes) for t in checkpoint.tensors.values())


def _commonest(sizes: tuple[TypeSize, ...]) -> str:
    if not sizes:
        raise CheckpointError("holds no tensors")
    return max(sizes, key=lambda size: size.weights).type
