"""The bytes that a model's weights take in every type that it can be converted to, or that it has.

Of a config.json, a checkpoint, or an output of any format; no weight is read.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from converters.exl2.shapes import HEAD_WEIGHT
from converters.folder_sizes import calibrated, folder_types
from converters.gguf import mixtures
from converters.gguf.file_types import MIXTURES
from converters.gguf.qtypes import QTYPES
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.locate import find, unfetched
from dsconvert.checkpoints.remote_model import RemoteModel
from dsconvert.checkpoints.source_files import weight_files
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import UsageError
from dsconvert.memory.model import Made, Sized, Weights, decoder_of, stored_specs, weights_of
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig, load_config, load_json, normalise
from dsconvert.models.diagnosis import stated_method
from dsconvert.models.tensor_table import Spec, expand
from dsconvert.vision.config import has_towers, towers_alone

OF_OTHERS = ("f32", "tq1_0", "tq2_0", "mxfp4_moe", "nvfp4")  # for models that were trained for them
# What runs a folder, by its quant_method.
RUN_BY = {"gptq": "transformers", "exl2": "exllamav2", "compressed-tensors": "transformers", "mlx": "mlx"}
LLAMA_CPP = ("llama.cpp", "llama.cpp-cpu")
NUMBERED = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")


def sizes_of(model: str, fetched: bool = False) -> Sized:
    """The types of what `model` names: an output in the one that it has, a checkpoint or config in all.

    A GGUF file, a folder of any format with or without weights, a config.json, a hub id, "sample:". Weights
    on the hub stay there, unless they are to be `fetched`. Raises ConversionError of every kind that opening
    has.

    >>> sized = sizes_of("sample:")
    >>> sized.parameters, [made.weights.total for made in sized.types if made.type == "q8_0"]
    (2622720, [2790400])
    """
    if model.endswith(".gguf"):
        return _of_gguf(Path(model))
    if Path(model).name == "config.json" and os.path.isfile(model):
        model = str(Path(model).absolute().parent)
    found = find(model if fetched else unfetched(model))
    folder = found.path if found.path.is_dir() else found.path.parent
    has_weights = found.remote is not None or weight_files(folder)
    if stated_method(load_json(folder / "config.json")) and has_weights:
        return _of_folder(folder, found.remote)
    if weight_files(folder):
        checkpoint = open_checkpoint(model)
        config, shapes = checkpoint.config, checkpoint.shapes()
        return _of_config(model, folder, config, stored_specs(config, shapes), checkpoint.notes)
    return _of_config(model, folder, config := load_config(folder), stored_specs(_untied(config)))


def _untied(config: ModelConfig) -> ModelConfig:
    """The config of a bigger model with a head of its own, which published ones have whatever theirs says."""
    mount = find_architecture(config.architecture).mount
    return replace(config, tied=False) if mount and mount.tied_outside else config


def _of_config(
    model: str, folder: Path, config: ModelConfig, specs: list[Spec], notes: tuple[str, ...] = ()
) -> Sized:
    beside = 0
    if has_towers(config):
        table, vision = towers_alone(folder, config)
        beside = sum(spec.values for spec in expand(table, vision) if not spec.row.optional)
    name = shlex.quote(model or ".")
    types = [*_plain(specs, beside), *_gguf(name, config, specs, beside)]
    types[1:1] = folder_types(name, config, specs, beside)
    count = sum(spec.values for spec in specs) + beside
    return Sized(model or folder.name, folder, decoder_of(config), count, tuple(types), notes)


def _plain(specs: list[Spec], beside: int) -> Iterator[Made]:
    weights = weights_of(specs, lambda spec: 2 * spec.values, 2 * beside)
    yield Made("bf16", ("eager", "transformers"), weights, "")


def _gguf(model: str, config: ModelConfig, specs: list[Spec], beside: int) -> Iterator[Made]:
    shapes = {spec.gguf: spec.shape for spec in specs}
    for quant in MIXTURES:
        if quant in OF_OTHERS:
            continue
        weighed = mixtures.needs_importance(quant)
        if weighed and not calibrated(config):
            continue
        choices = mixtures.choose_for(config, quant, shapes, imatrix=weighed)
        weights = weights_of(specs, partial(_gguf_size, choices), 2 * beside)
        command = f"dsconvert gguf {model} --quant {quant}" + " --calib c4" * weighed
        yield Made(quant, LLAMA_CPP, weights, command)


def _gguf_size(choices: Mapping[str, mixtures.Choice], spec: Spec) -> int:
    return QTYPES[choices[spec.gguf].type].nbytes(spec.values)


def _of_gguf(path: Path) -> Sized:
    from converters.gguf.opened import stated_quant
    from converters.gguf.parse import open_gguf
    from converters.gguf.stored_config import stored_config
    from dsconvert.proof.result import sizes_by_type

    file = open_gguf(path)
    config = stored_config(file)
    sizes = {name: tensor.nbytes for name, tensor in file.tensors.items()}
    types = sizes_by_type((t.qtype.name, t.values, t.nbytes) for t in file.tensors.values())
    weights = _by_place(sizes, "token_embd.", "output.weight", lambda name: True)
    made = Made(stated_quant(file, types), LLAMA_CPP, weights, "")
    count = sum(tensor.values for tensor in file.tensors.values())
    return Sized(str(path), path, decoder_of(config), count, (made,))


def _of_folder(folder: Path, remote: RemoteModel | None) -> Sized:
    """An output in a folder: what its files hold, by the names of its decoder's tensors."""
    raw = load_json(folder / "config.json")
    config = normalise(raw, folder / "config.json")
    method = stated_method(raw)
    if method not in RUN_BY:
        raise UsageError(
            f"is quantized by a method whose memory is not computed here, {method[:40]!r}", where=folder
        )
    specs, elsewhere = stored_specs(_untied(config)), remote.weights if remote is not None else None
    stems = {name.removesuffix(".weight") for spec in specs for name in spec.names}
    head = next((spec.hf for spec in specs if spec.role == "head"), HEAD_WEIGHT).removesuffix("weight")
    embed = next(spec.hf for spec in specs if spec.role == "embed").removesuffix("weight")
    sizes = {name: tensor.nbytes for name, tensor in open_weights(folder, elsewhere).tensors.items()}
    weights = _by_place(
        sizes, embed, head, lambda name: name.rpartition(".")[0] in stems or name.startswith(head)
    )
    return Sized(
        str(folder), folder, decoder_of(config), sum(spec.values for spec in specs),
        (Made(method, (RUN_BY[method],), weights, ""),),
    )  # fmt: skip


def _by_place(sizes: Mapping[str, int], embed: str, head: str, decoder: Callable[[str], bool]) -> Weights:
    """Stored tensors sorted to where they stand; those that are no `decoder`'s are beside it."""
    embedding = last = beside = 0
    blocks: dict[int, int] = {}
    for name, nbytes in sizes.items():
        found = NUMBERED.search(name)
        if not decoder(name):
            beside += nbytes
        elif name.startswith(embed):
            embedding += nbytes
        elif found:
            blocks[int(found[1])] = blocks.get(int(found[1]), 0) + nbytes
        else:
            last += nbytes
    tied = not any(name.startswith(head) for name in sizes)
    return Weights(embedding, tuple(blocks[i] for i in sorted(blocks)), last, beside, tied)
