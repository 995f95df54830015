"""The file of an importance matrix: what `dsconvert imatrix` measures and writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from converters.gguf.calibrate import draw_windows, file_keys, measure_inputs
from converters.gguf.importance import Floats
from converters.gguf.layout import KeyValues, Tensor, is_gguf, lay_out
from converters.gguf.qtypes import QTYPES
from dsconvert.calibration.request import CalibrationRequest, check_chat
from dsconvert.checkpoints.output_files import part_files
from dsconvert.checkpoints.output_plan import check_files
from dsconvert.checkpoints.source_files import check_unchanged
from dsconvert.events import Event, Finished, Warn
from dsconvert.libraries import TORCH, need
from dsconvert.proof.sources import Reference


@dataclass(frozen=True)
class Options:
    """The file to write, the text to measure on, and the device that runs the model."""

    out: Path
    calibration: CalibrationRequest
    force: bool = False
    device: str = "auto"


def make(options: Options, open_model: Callable[[], Reference]) -> Iterator[Event]:
    """Draw calibration windows, run the model over them, write the file.

    `open_model` opens the checkpoint, after what can be checked without it. Raises ConversionError.

    >>> from converters.outputs import open_reference
    >>> from converters.gguf.parse import open_gguf
    >>> few = CalibrationRequest("builtin", samples=2, length=32)
    >>> events = list(make(Options(Path("imatrix.gguf").absolute(), few), lambda: open_reference("sample:")))
    >>> len(open_gguf(Path("imatrix.gguf")).tensors)
    28
    """
    started = time.monotonic()
    need(*TORCH, what="calibration")
    check_chat(options.calibration.chat)
    check_files([options.out], [0], force=True)
    reference = open_model()
    inputs = [
        reference.folder,
        *(file.path for file in reference.checkpoint.seen),
        *options.calibration.files,
    ]
    check_files([options.out], [0], force=options.force, inputs=inputs, ours=is_gguf)
    for note in reference.notes:
        yield Warn(note)
    # Conversations go through the template that a GGUF file gets: of a model with a tower it is another one.
    chat = replace(reference.tokenizer.chat, default=reference.templates[-1])
    tokenizer = replace(reference.tokenizer, chat=chat)
    drawn = yield from draw_windows(options.calibration, tokenizer, reference.config.context_length)
    tensors = yield from measure_inputs(reference.source, reference.config, drawn, options.device)
    check_unchanged(reference.checkpoint.seen)
    nbytes = save(options.out, file_keys(drawn.report), tensors, options.force, inputs)
    yield Finished(str(options.out), nbytes, time.monotonic() - started)


def save(
    path: Path, keys: KeyValues, tensors: Mapping[str, Floats], force: bool, inputs: Sequence[Path] = ()
) -> int:
    """Write float32 tensors as a GGUF file; returns its size in bytes."""
    layout = lay_out(path.name, keys, [Tensor(name, a.shape, QTYPES["f32"]) for name, a in tensors.items()])
    with part_files([path], [layout.nbytes], force, inputs, is_gguf) as (part,):
        part.write(layout.head, 0)
        for name, array in tensors.items():
            part.write(array.astype("<f4").tobytes(), layout.offsets[name])
    return layout.nbytes
