"""`dsconvert imatrix`: an importance matrix in llama.cpp's GGUF format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands.running import run

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

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
@click.option(
    "--calib",
    default="c4",
    show_default=True,
    metavar="c4|wikitext2|builtin|FILE|DIR",
    help="Calibration text.",
)
@click.option("--calib-samples", type=click.IntRange(1), default=128, show_default=True, help="Windows.")
@click.option(
    "--calib-len", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which windows are drawn.")
@click.option("--offline", is_flag=True, help="Take cached texts or the built-in one; ask no network.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for everything that happens.")
@click.option("--quiet", is_flag=True, help="Only warnings and failures.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def imatrix(model_path: str, as_json: bool, quiet: bool, debug: bool, **asked: Any) -> None:
    """Measure which inputs of each linear matter on calibration text, for llama.cpp's quantizers.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample).
    """

    def work() -> int:
        from dsconvert import console

        return console.render(make(model_path, **asked), as_json=as_json, quiet=quiet)

    run(work, as_json=as_json, debug=debug)


def make(
    model: str,
    *,
    outfile: Path,
    calib: str = "c4",
    calib_samples: int = 128,
    calib_len: int = 512,
    seed: int = 0,
    offline: bool = False,
    force: bool = False,
    device: str = "auto",
) -> Iterator[Event]:
    """Draw calibration windows, run the model over them, write the file."""
    import time

    import numpy as np

    from converters.gguf.writer import check_targets
    from dsconvert import imatrix as importance
    from dsconvert import streaming as st
    from dsconvert.calibrate import Wanted, calibrate
    from dsconvert.commands.sources import open_reference
    from dsconvert.events import Finished
    from dsconvert.text import evaluation_page

    started = time.monotonic()
    outfile = outfile.absolute()
    check_targets([outfile], [0], force)
    reference = open_reference(model)
    data, config = reference.tokenizer, reference.config
    wanted = Wanted(calib, calib_samples, calib_len, seed, data.first_id, None, offline)
    (held,) = data.encode([evaluation_page(20_000)])
    drawn = yield from calibrate(wanted, data.encode, config.context_length, np.array([held], np.int64))
    place = st.pick_device(device)
    decoder = st.open_decoder(reference.source, config, place, st.pick_dtype(None, place))
    found = yield from importance.measure(decoder, drawn.tokens)
    samples, length = drawn.tokens.shape
    keys = {
        "general.type": ("string", "imatrix"),
        "imatrix.datasets": ("array:string", [f"{drawn.report.text} sha256:{drawn.report.fingerprint}"]),
        "imatrix.chunk_count": ("uint32", samples),
        "imatrix.chunk_size": ("uint32", length),
    }
    nbytes = save(outfile, keys, importance.tensors(found, decoder), force)
    yield Finished(str(outfile), nbytes, time.monotonic() - started)


def save(
    path: Path,
    keys: Mapping[str, tuple[str, Any]],
    tensors: Mapping[str, npt.NDArray[np.float32]],
    force: bool,
) -> int:
    """Write float32 tensors as a GGUF file; gives its size."""
    from converters.gguf.layout import Tensor, lay_out
    from converters.gguf.qtypes import QTYPES
    from converters.gguf.writer import part_files

    layout = lay_out(path.name, keys, [Tensor(name, a.shape, QTYPES["f32"]) for name, a in tensors.items()])
    with part_files([path], [layout.nbytes], force) as (part,):
        part.write(layout.head, 0)
        for name, array in tensors.items():
            part.write(array.astype("<f4").tobytes(), layout.offsets[name])
    return layout.nbytes
