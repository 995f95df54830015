"""What is compared: the checkpoint that counts as right, and an output, both opened already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.errors import CheckpointError, TokenizerError, UsageError
from dsconvert.events import Check
from dsconvert.models.config import ModelConfig
from dsconvert.models.diagnosis import is_left_over
from dsconvert.models.weights import WeightSource
from dsconvert.proof.result import TypeSize
from tokenizer_tools.identity import TextHandling, of_data
from tokenizer_tools.load import TokenizerData, load_tokenizer

# The mixture whose limits a stranger's type has to keep, by its bits per weight.
BY_BITS = ((12.0, "bf16"), (7.5, "q8_0"), (6.0, "q6_k"), (4.8, "q5"), (3.8, "q4_0"), (2.8, "q3"), (0.0, "q2"))


# Name, shape and type (of EXL2 the groups) of every tensor of an output.
StoredTensors = frozenset[tuple[str, tuple[int, ...], object]]


@dataclass(frozen=True)
class Reference:
    """The checkpoint that outputs are held against.

    `whole` is what its config.json says, of a model with towers too; `source` and `config` are the decoder,
    under its architecture's own names.
    """

    checkpoint: Checkpoint
    whole: ModelConfig
    source: WeightSource
    config: ModelConfig
    tokenizer: TokenizerData = field(repr=False)
    templates: tuple[str, ...] = field(repr=False)  # the chat templates that an output may carry
    notes: tuple[str, ...] = field(repr=False, default=())  # on how it was found and read
    name: str = ""  # as the user gave it: reports say no more of where it lies
    add_bos: bool | None = None  # whether BOS goes before a text, where that was asked for

    @property
    def folder(self) -> Path:
        """The folder that holds config.json."""
        return self.checkpoint.folder

    @property
    def title(self) -> str:
        """The model's name in a report: the last part of what the user gave, of "." the folder's own."""
        return Path(self.name).name.strip(".") or self.folder.resolve().name


@dataclass(frozen=True)
class Opened:
    """An output as a weight source, with what its files say of text, types and sizes.

    `quant` is the type or mixture that it says it is, `limits` the name of its tensors' thresholds. `nbytes`
    counts the files, `sizes` the tensors. `stored` are these under the file's own names, `holds` a line on
    them; `strange` says which of them no model has, and `source` leaves out. `own` are the checks of its
    format alone.
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
    stored: StoredTensors = field(repr=False)
    holds: str
    strange: tuple[str, ...] = ()
    own: Callable[[Reference], list[Check]] = field(default=lambda reference: [], repr=False)
    keys: Mapping[str, Any] = field(default_factory=dict, repr=False)  # a GGUF file's
    notes: tuple[str, ...] = field(default=(), repr=False)  # on how a 16-bit folder was read
    by_cost: Mapping[str, Any] = field(default_factory=dict, repr=False)  # what it says of types so chosen

    @property
    def bits(self) -> float:
        """Bits per weight over all tensors."""
        return 8 * sum(s.nbytes for s in self.sizes) / max(1, sum(s.weights for s in self.sizes))


def text_handling(opened: Callable[[], TextHandling]) -> TextHandling | TokenizerError:
    """What `opened` returns, or its error: without a usable tokenizer an output fails, the run goes on."""
    try:
        return opened()
    except TokenizerError as error:
        return error


def folder_text(folder: Path, vocab_size: int) -> TextHandling | TokenizerError:
    """How a folder's own tokenizer files handle text."""
    return text_handling(lambda: of_data(load_tokenizer(folder, vocab_size)))


def commonest(sizes: tuple[TypeSize, ...]) -> str:
    """The type of most weights; raises CheckpointError where there are none."""
    if not sizes:
        raise CheckpointError("holds no tensors")
    return max(sizes, key=lambda size: size.weights).type


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
