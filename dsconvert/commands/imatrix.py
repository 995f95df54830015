"""`dsconvert imatrix`: an importance matrix in llama.cpp's GGUF format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands.calibration_options import bos_option, calibration_options, wanted_of
from dsconvert.commands.run import run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from converters.gguf.layout import KeyValues
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.events import Event


@click.command()
@click.argument("model_path", required=False, default="")
@click.option(
    "-o",
    "--outfile",
    type=click.Path(path_type=Path),
    default="imatrix.gguf",
    show_default=True,
    help="Output file.",
)
@calibration_options("c4", 512)
@bos_option
@click.option("--force", is_flag=True, help="Replace an existing output, never a file that is read.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for everything that happens.")
@click.option("--quiet", is_flag=True, help="Only warnings and failures.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def imatrix(model_path: str, as_json: bool, quiet: bool, debug: bool, **asked: Any) -> None:
    """Measure which inputs of each linear matter on calibration text, for llama.cpp's quantizers.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder.
    """

    def work() -> int:
        from dsconvert import console

        asked["wanted"] = wanted_of(asked)
        return console.render(make(model_path, **asked), as_json=as_json, quiet=quiet)

    run(work, as_json=as_json, debug=debug)


def make(
    model: str,
    *,
    outfile: Path,
    wanted: CalibrationRequest,
    add_bos: bool | None = None,
    force: bool = False,
    device: str = "auto",
) -> Iterator[Event]:
    """Draw calibration windows, run the model over them, write the file."""
    import time
    from dataclasses import replace

    from converters.gguf import calibrate
    from converters.gguf.layout import is_gguf
    from converters.outputs import open_reference
    from dsconvert.calibration.request import check_chat
    from dsconvert.checkpoints.output_plan import check_files
    from dsconvert.checkpoints.source_files import check_unchanged
    from dsconvert.events import Finished, Warn

    started = time.monotonic()
    outfile = outfile.absolute()
    check_chat(wanted.chat)
    check_files([outfile], [0], force=True)  # what can be known before the model is opened
    reference = open_reference(model, add_bos)
    inputs = [reference.folder, *(file.path for file in reference.checkpoint.seen), *wanted.files]
    check_files([outfile], [0], force=force, inputs=inputs, ours=is_gguf)
    for note in reference.notes:
        yield Warn(note)
    # Conversations go through the template that a GGUF file gets: of a model with a tower it is another one.
    chat = replace(reference.tokenizer.chat, default=reference.templates[-1])
    tokenizer = replace(reference.tokenizer, chat=chat)
    drawn = yield from calibrate.draw_windows(wanted, tokenizer, reference.config.context_length)
    tensors = yield from calibrate.measure_inputs(reference.source, reference.config, drawn, device)
    check_unchanged(reference.checkpoint.seen)
    nbytes = save(outfile, calibrate.file_keys(drawn.report), tensors, force, inputs)
    yield Finished(str(outfile), nbytes, time.monotonic() - started)


def save(
    path: Path,
    keys: KeyValues,
    tensors: Mapping[str, npt.NDArray[np.float32]],
    force: bool,
    inputs: Sequence[Path] = (),
) -> int:
    """Write float32 tensors as a GGUF file; gives its size."""
    from converters.gguf.layout import Tensor, is_gguf, lay_out
    from converters.gguf.qtypes import QTYPES
    from dsconvert.checkpoints.output_files import part_files

    layout = lay_out(path.name, keys, [Tensor(name, a.shape, QTYPES["f32"]) for name, a in tensors.items()])
    with part_files([path], [layout.nbytes], force, inputs, is_gguf) as (part,):
        part.write(layout.head, 0)
        for name, array in tensors.items():
            part.write(array.astype("<f4").tobytes(), layout.offsets[name])
    return layout.nbytes
