"""What a proof is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsconvert.texts.defaults import LENGTH, STRIDE, WINDOWS
from dsconvert.texts.sets import BUILTIN

Mode = Literal["quick", "full"]


@dataclass(frozen=True)
class ProofOptions:
    """How an output is to be verified; conversions and `verify` differ in nothing where these are the same.

    `length` 0 stands for LENGTH. `threads` read the weights and compute, by default one on each core.
    """

    text: str = BUILTIN
    windows: int = WINDOWS
    length: int = LENGTH
    stride: int = STRIDE
    device: str = "auto"
    dtype: str | None = None
    max_kld: float | None = None
    max_ppl_ratio: float | None = None
    min_top1: float | None = None
    kld_base: Path | None = None
    engine: str | None = None
    effort: str = "full"
    threads: int = 0

    @property
    def names_arithmetic(self) -> bool:
        """Whether device, type or runtime are asked for, so that numpy on the CPU will not do."""
        others = (self.dtype, self.kld_base, self.engine)
        return self.device != "auto" or any(other is not None for other in others)
