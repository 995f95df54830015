"""The options of a conversion to GGUF, and one of its outputs: files with their tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.gguf.layout import Layout, Tensor
from dsconvert.checkpoints.locate import ModelPath

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.quantization.budget import Budget


@dataclass(frozen=True)
class Options:
    """What `dsconvert gguf` was asked for."""

    model: str | ModelPath
    quants: tuple[str, ...] = ("q4_0",)
    outfile: Path | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    pure: bool = False
    pre: str | None = None
    split_max_size: int | None = None
    threads: int = 0
    effort: str = "quick"
    force: bool = False
    dry_run: bool = False
    allow_nonfinite: bool = False
    mmproj: Path | None = None
    no_mmproj: bool = False
    mmproj_quant: str = "f16"
    device: str = "auto"  # of a calibration and of a full proof; the conversion itself is the CPU's
    imatrix: Path | None = None
    add_bos: bool | None = None
    ollama: bool = False
    calibration: CalibrationRequest | None = None  # the text to measure an importance matrix on, on the way
    solver: str = "imatrix"  # what becomes of the measurement: "imatrix", or "gptq" for error feedback
    rounds: int | None = None  # of refinement after it; None: by the type
    resume: bool = False
    budget: Budget | None = None  # instead of `quants`: types by cost, within it


@dataclass(frozen=True)
class Output:
    """One quantization of the model, or its projector: files, and where each tensor lies in them."""

    quant: str
    layouts: tuple[Layout, ...]
    tensors: dict[str, Tensor]
    fallbacks: dict[str, int]  # "wanted -> taken" where rows did not fit, and how often
    folder: Path

    @property
    def paths(self) -> list[Path]:
        """The final name of every file, in the order of `layouts`."""
        return [self.folder / layout.name for layout in self.layouts]

    def place(self, name: str) -> tuple[int, int]:
        """The number of the file that holds a tensor, and the tensor's offset in it."""
        for number, layout in enumerate(self.layouts):
            if name in layout.offsets:
                return number, layout.offsets[name]
        raise KeyError(name)
