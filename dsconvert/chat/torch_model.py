"""A model folder as a model to talk to: its weights read back and dequantized, in transformers' layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from dsconvert.chat.model import ChatText, Floats, Part, Stopped
from dsconvert.decoder.torch_continued import Continued
from dsconvert.decoder.torch_decoder import open_decoder, pick_device
from dsconvert.errors import UsageError
from dsconvert.machine import free_memory
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource
from tokenizer_tools.kinds import BYTE_LEVEL
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.special import byte_alphabet
from tokenizer_tools.spm import BYTES, SPACE
from tokenizer_tools.vocabulary import BYTE, CONTROL, NORMAL

SPARE = 1.2  # what goes on top of the weights: activations, keys and values, Python


class TorchModel:
    """A decoder in torch whose weights, of whatever type, are held as 16- or 32-bit numbers."""

    def __init__(
        self, source: WeightSource, config: ModelConfig, tokenizer: TokenizerData, device: str, context: int
    ) -> None:
        import torch

        where = pick_device(device)
        weights = sum(map(prod, source.shapes().values()))
        dtype = torch.bfloat16 if where.type == "cuda" or not fits(weights, 4) else torch.float32
        if where.type == "cpu" and not fits(weights, 2):
            raise UsageError(
                f"a folder is run with its weights as 16-bit numbers, which takes {2 * weights / 1e9:.1f} GB",
                where=tokenizer.source.parent,
                why=f"{free_memory() / 1e9:.1f} GB are free",
                hint="Convert it with `dsconvert gguf`: llama.cpp runs the quantized weights as they are",
            )
        self.text = chat_text(tokenizer)
        self.context = context
        self._sequence = Continued(open_decoder(source, config, where, dtype))

    def embed(self, prompt: str, pictures: Sequence[Path]) -> list[Part]:
        """As Model says; there are no pictures."""
        if pictures:
            raise UsageError(
                "pictures are read in llama.cpp, from a GGUF file and its projector",
                where=self.text.where,
                hint="Convert the checkpoint with `dsconvert gguf`, and give the text file",
            )
        return [self.text.encode(prompt)]

    def read(self, part: Part, at: int, stopped: Stopped) -> Floats | None:
        """As Model says."""
        return self._sequence.read(part, at, stopped)

    def forget(self, length: int) -> int:
        """As Model says."""
        return self._sequence.forget(length)


def fits(weights: int, nbytes: int) -> bool:
    """Whether so many weights of `nbytes` bytes each can be held."""
    return SPARE * weights * nbytes < free_memory()


def chat_text(tokenizer: TokenizerData) -> ChatText:
    """How a folder's files take and give text; it stops at every end that they state."""
    special = tokenizer.special
    names = {f"{name}_token": tokenizer.tokens[special[name]] if name in special else "" for name in NAMES}
    return ChatText(
        where=tokenizer.source.parent,
        template=tokenizer.chat.default,
        names=names,
        bos=tokenizer.bos_id,
        add_bos=tokenizer.add_bos,
        stops=frozenset(tokenizer.stops),
        encode=lambda text: tokenizer.encode([text])[0],
        piece=lambda token: piece(tokenizer, token),
    )


NAMES = ("bos", "eos")
_BYTE_OF = {char: byte for byte, char in byte_alphabet().items()}


def piece(tokenizer: TokenizerData, token: int) -> bytes:
    """The bytes of one token; none of a special one, or of a row of the embedding that is no token."""
    text, kind = tokenizer.tokens[token], tokenizer.types[token]
    if token >= tokenizer.used or kind == CONTROL:
        return b""
    if kind not in (NORMAL, BYTE):
        return text.encode("utf-8", "replace")
    if tokenizer.kind == BYTE_LEVEL.model:
        return bytes(_BYTE_OF[char] for char in text if char in _BYTE_OF)
    return bytes([BYTES[text]]) if text in BYTES else text.replace(SPACE, " ").encode("utf-8", "replace")
