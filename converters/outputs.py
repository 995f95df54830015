"""Opens what the user names: the checkpoint to compare with, and an output of any known format."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.locate import SAMPLES, ModelPath, in_folder, locate
from dsconvert.errors import UsageError
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import load_json
from dsconvert.models.diagnosis import stated_method
from dsconvert.models.language_model import language_model
from dsconvert.proof.result import sizes_by_type
from dsconvert.proof.sources import Opened, Reference, commonest, folder_text, is_plain
from tokenizer_tools import show
from tokenizer_tools.load import load_tokenizer


def open_reference(model: str | ModelPath, add_bos: bool | None = None) -> Reference:
    """The 16-bit checkpoint that `model` names, BOS before a text where `add_bos` or its files say so.

    Raises ConversionError of every kind that opening has.

    >>> reference = open_reference("sample:")
    >>> reference.title, reference.config.layers, reference.tokenizer.add_bos
    ('sample:', 2, True)
    """
    from dsconvert.vision.plan import plan_towers, with_template

    checkpoint = open_checkpoint(model)
    config = checkpoint.config
    find_architecture(config.architecture, checkpoint.folder / "config.json")
    tokenizer = load_tokenizer(checkpoint.folder, config.vocab_size, add_bos)
    towers = plan_towers(checkpoint, config, tokenizer)
    templates = [tokenizer.chat.default]
    if towers is not None:  # a GGUF file of it gets a template that takes pictures
        templates.append(with_template(tokenizer, towers).chat.default)
    source, decoder = language_model(checkpoint, config)
    notes = (*checkpoint.notes, *config.notes)
    return Reference(
        checkpoint, config, source, decoder, tokenizer, tuple(templates), notes,
        str(model) or checkpoint.folder.name, add_bos,
    )  # fmt: skip


def open_output(path: Path) -> Opened:
    """Recognise an output by what it is: a GGUF file, or a folder by its quantization_config.

    Raises UsageError for what is neither, and what the format's reader raises.

    >>> opened = open_output(locate("sample:"))
    >>> opened.kind, opened.quant, opened.bits
    ('checkpoint', 'bf16', 16.0)
    """
    if os.path.isfile(path):  # Path.is_file raises where one may not look
        return _open_gguf(path)
    if not os.path.isdir(path):
        raise UsageError(
            "there is no such file or folder", where=path, hint="Give a GGUF file or a model folder"
        )
    path = in_folder(path).path
    stated = load_json(path / "config.json")
    method = stated_method(stated)
    if not method or is_plain(path, method):
        return _open_checkpoint(path)
    if method not in OPENERS:
        raise UsageError(
            f"is quantized by a method that is not read here, {method[:40]!r}",
            where=path,
            why=f"known: GGUF files, 16-bit folders, {', '.join(OPENERS)}",
        )
    return OPENERS[method](path, stated)


def open_tokenizer(path: Path) -> show.Opened:
    """The tokenizer of a GGUF file, a model folder, a tokenizer.json or a tokenizer.model.

    Raises TokenizerError, and what the reader of GGUF files raises.

    >>> open_tokenizer(Path("sample:")).kind
    'byte-level BPE'
    """
    if path.suffix != ".gguf":
        if str(path) in SAMPLES:
            return show.open_folder(locate(str(path)))
        bare = os.path.isdir(path) and not os.path.exists(path / "tokenizer.json")
        return show.open_folder(in_folder(path).path if bare else path)
    from converters.gguf.parse import open_gguf

    return show.open_metadata(path, open_gguf(path).keys)


def _open_checkpoint(path: Path) -> Opened:
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    sizes = sizes_by_type((t.dtype, prod(t.shape), t.nbytes) for t in checkpoint.tensors.values())
    source, decoder = language_model(checkpoint, config, checkpoint.folder / "config.json", partial=True)
    stored = frozenset((name, t.shape, t.dtype) for name, t in checkpoint.tensors.items())
    quant = commonest(sizes)
    text = folder_text(checkpoint.folder, config.vocab_size)
    return Opened(
        path, "checkpoint", quant, quant, source, decoder, text, sizes, checkpoint.nbytes, stored,
        f"{len(stored)} tensors", notes=checkpoint.notes,
    )  # fmt: skip


def _open_gguf(path: Path) -> Opened:
    from converters.gguf.opened import open_file

    return open_file(path)


def _open_gptq(path: Path, stated: dict[str, Any]) -> Opened:
    from converters.gptq.opened import open_folder

    return open_folder(path, stated)


def _open_exl2(path: Path, stated: dict[str, Any]) -> Opened:
    from converters.exl2.opened import open_folder

    return open_folder(path, stated)


def _open_compressed(path: Path, stated: dict[str, Any]) -> Opened:
    from converters.compressed.opened import open_folder

    return open_folder(path, stated)


def _open_mlx(path: Path, stated: dict[str, Any]) -> Opened:
    from converters.mlx.opened import open_folder

    return open_folder(path, stated)


# How folders are opened, by the quant_method of their quantization_config; with their config.json.
OPENERS: dict[str, Callable[[Path, dict[str, Any]], Opened]] = {
    "gptq": _open_gptq,
    "exl2": _open_exl2,
    "compressed-tensors": _open_compressed,
    "mlx": _open_mlx,
}
