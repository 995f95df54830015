"""A model for the chat's logic whose answers are written down: its tokens are bytes and some special."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dsconvert.chat.model import ChatText, Floats, Part, Stopped

BOS, EOS, EOT, UNKNOWN = 256, 257, 258, 259
SPECIAL = {"<bos>": BOS, "<eos>": EOS, "<eot>": EOT}
VOCAB = 260
# As many models have it: the turns end with <eot>, and BOS is written by the template itself.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PICTURE = 4  # embeddings that stand for one


def encode(text: str) -> list[int]:
    """Bytes, and the special tokens by their texts."""
    found: list[int] = []
    while text:
        special = next((name for name in SPECIAL if text.startswith(name)), None)
        found += [SPECIAL[special]] if special else text[0].encode()
        text = text[len(special or text[0]) :]
    return found


def piece(token: int) -> bytes:
    """The byte that a token is."""
    return bytes([token]) if token < 256 else b""


@dataclass
class Scripted:
    """Answers with `script`, one list of tokens for each prompt; remembers everything that it reads.

    After a script's end it repeats the last token, as a model may that finds no end.
    """

    script: list[list[int]]
    text: ChatText
    context: int = 4096
    keeps: bool = True  # whether its memory can be cut back
    read_at: list[tuple[int, list[int]]] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)

    def embed(self, prompt: str, pictures: Sequence[Path]) -> list[Part]:
        """Bytes, and four embeddings of the value of the picture's name for each marker."""
        if not self.text.marker:
            return [encode(prompt)]
        texts = prompt.split(self.text.marker)
        assert len(texts) == len(pictures) + 1
        parts: list[Part] = [encode(texts[0])]
        for picture, after in zip(pictures, texts[1:], strict=True):
            parts += [np.full((PICTURE, 8), hash(picture.name) % 97, np.float32), encode(after)]
        return [part for part in parts if len(part)]

    def read(self, part: Part, at: int, stopped: Stopped) -> Floats | None:
        """Logits that leave no choice but the next token of the script."""
        assert at == len(self.seen)
        if len(part) > 1 and stopped():
            return None
        tokens = [UNKNOWN] * len(part) if isinstance(part, np.ndarray) else list(part)
        self.seen += tokens
        assert len(self.seen) <= self.context
        self.read_at.append((at, tokens))
        if not (len(tokens) == 1 and self.said and tokens[0] == self.said[-1]):
            self.said = []
        script = self.script[0]
        token = script[min(len(self.said), len(script) - 1)]
        self.said.append(token)
        if token in self.text.stops:
            self.script.pop(0)
            self.said = []
        logits = np.full(VOCAB, -30.0, np.float32)
        logits[token] = 30.0
        return logits

    def forget(self, length: int) -> int:
        """The first positions, or none where the memory cannot be cut."""
        kept = length if self.keeps or length == len(self.seen) else 0
        del self.seen[kept:]
        return kept


def scripted(
    *answers: str | list[int], template: str = TEMPLATE, context: int = 4096, **changes: object
) -> Scripted:
    """A model that gives these answers, each a text that ends with <eot>, or tokens as they are."""
    script = [[*answer.encode(), EOT] if isinstance(answer, str) else answer for answer in answers]
    settings: dict[str, object] = {
        "where": Path("scripted"), "template": template,
        "names": {"bos_token": "<bos>", "eos_token": "<eos>"},
        "bos": BOS, "add_bos": True, "stops": frozenset({EOS, EOT}), "encode": encode, "piece": piece,
    }  # fmt: skip
    return Scripted(script, ChatText(**{**settings, **changes}), context)  # type: ignore[arg-type]
