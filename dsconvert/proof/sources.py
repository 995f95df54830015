"""What is compared: the checkpoint that counts as right, and an output, both opened already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.checkpoints.source_files import SourceFile
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import TokenizerError, UsageError
from dsconvert.models.config import ModelConfig
from dsconvert.models.diagnosis import is_left_over
from dsconvert.models.tensor_table import WeightSource
from dsconvert.proof.result import TypeSize
from tokenizer_tools.identity import TextHandling
from tokenizer_tools.load import TokenizerData

if TYPE_CHECKING:
    from converters.gguf.projector.proof import Pictured

# The mixture whose limits a stranger's type has to keep, by its bits per weight.
BY_BITS = ((12.0, "bf16"), (7.5, "q8_0"), (6.0, "q6_k"), (4.8, "q5"), (3.8, "q4_0"), (2.8, "q3"), (0.0, "q2"))


@dataclass(frozen=True)
class Reference:
    """The checkpoint that outputs are held against; its decoder under its architecture's own names."""

    folder: Path
    source: WeightSource
    config: ModelConfig
    tokenizer: TokenizerData = field(repr=False)
    templates: tuple[str, ...] = field(repr=False)  # the chat templates that an output may carry
    pictured: Pictured | None = field(repr=False)  # the same with its towers; None without any
    notes: tuple[str, ...] = field(repr=False, default=())  # on how it was found and read
    seen: tuple[SourceFile, ...] = field(repr=False, default=())  # the files as they were opened
    name: str = ""  # as the user gave it: reports say no more of where it lies

    @property
    def title(self) -> str:
        """The model's name in a report: the last part of what the user gave, of "." the folder's own."""
        return Path(self.name).name.strip(".") or self.folder.resolve().name


@dataclass(frozen=True)
class Opened:
    """An output as a weight source, with what its files say of text, types and sizes.

    `quant` is the type or mixture that it says it is, `limits` the name of the thresholds for it. `nbytes`
    counts the files, `sizes` the tensors.
    """

    path: Path
    kind: str
    quant: str
    limits: str
    source: WeightSource
    config: ModelConfig
    text: TextHandling | TokenizerError  # the error where the files give no tokenizer
    sizes: tuple[TypeSize, ...]
    nbytes: int
    keys: Mapping[str, Any] = field(default_factory=dict, repr=False)  # a GGUF file's
    notes: tuple[str, ...] = field(default=(), repr=False)  # on how a 16-bit folder was read

    @property
    def bits(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * sum(s.nbytes for s in self.sizes) / max(1, sum(s.weights for s in self.sizes))


def is_plain(folder: Path, method: str) -> bool:
    """Whether the weights of a folder are plain ones in spite of the method that its config.json states."""
    if method == "exl2":  # its folders may hold another model's index
        return False
    return is_left_over(method, {name: t.dtype for name, t in open_weights(folder).tensors.items()})


def limits_name(opened: Opened) -> str:
    """The name under which thresholds for this output are shipped; a stranger's type goes by its bits."""
    from dsconvert.proof.thresholds import thresholds_for

    try:
        thresholds_for(opened.limits)
    except UsageError:
        return next(name for least, name in BY_BITS if opened.bits >= least)
    return opened.limits
