"""`dsconvert imatrix`: an importance matrix in llama.cpp's GGUF format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert.commands import shared_options as shared
from dsconvert.commands.calibration_options import calibration_options
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.commands.display import Display


@command
@shared.model_argument
@shared.out_option("imatrix.gguf")
@calibration_options("c4", 512)
@shared.bos_option
@shared.hub_options
@shared.force_option
@shared.device_option
def imatrix(
    model_path: ModelPath,
    out: Path,
    calibration: CalibrationRequest,
    add_bos: bool | None,
    force: bool,
    device: str,
    display: Display,
) -> int:
    """Measure which inputs of each linear matter on calibration text, for llama.cpp's quantizers.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder.

    \b
    Example:
      dsconvert imatrix sample: --calib builtin --outfile im.gguf
    """  # fmt: skip
    from converters.gguf.importance_file import Options, make
    from converters.outputs import open_reference

    options = Options(out.absolute(), calibration, force, device)
    return display.events(make(options, lambda: open_reference(model_path, add_bos)))
