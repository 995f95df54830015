"""Reads the tokenizer of a checkpoint folder, checks it, and states it in a GGUF file's terms.

tokenizer.json is read with the `tokenizers` library, never through a transformers class: those rewrite
pre-tokenizers and drop BOS from one version to the next.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError, UsageError
from tokenizer_tools import chat_template, kinds, rendering, sentencepiece_model
from tokenizer_tools.added import add, beside, flag_notes, with_added, without_rows
from tokenizer_tools.chat_template import ChatTemplates
from tokenizer_tools.kinds import Kind, kind_of
from tokenizer_tools.library import ids, open_json, open_tokenizer, parse_object, read_object, read_text
from tokenizer_tools.rendering import Unrendered
from tokenizer_tools.special import additions, lost_bos, special_ids
from tokenizer_tools.steps import PreTokenizer
from tokenizer_tools.stops import lost_stops, stop_ids
from tokenizer_tools.vocabulary import (
    GPT2_CLASSES,
    UNUSED,
    AddedToken,
    added_tokens,
    gpt2_json,
    read_vocab,
    rows_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TokenizerData:
    """A tokenizer in a GGUF file's terms.

    `kind` is its `tokenizer.ggml.model`: gpt2 (byte-level BPE) or llama (SentencePiece-like BPE).
    `tokens` and `types` have one entry per embedding row, of which the first `used` may be tokens; `merges`
    are "left right"; `stops` are the ids that end a generation, EOS first; `normalizer` is "" or "nfc".
    `scores` (one for each token) and `spaces` (how a space comes before a text, see spm.py) are llama's,
    `spec` is gpt2's.
    `json` is the text of tokenizer.json, as read where no other file adds to it, `tokenizer` the library's
    object made of it (never print that: its repr can panic). `notes` are for the user.
    """

    tokens: tuple[str, ...] = field(repr=False)
    types: tuple[int, ...] = field(repr=False)
    merges: tuple[str, ...] = field(repr=False)
    added: tuple[AddedToken, ...] = field(repr=False)
    special: Mapping[str, int]
    stops: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    ignore_merges: bool
    normalizer: str
    spec: PreTokenizer
    chat: ChatTemplates = field(repr=False)
    json: str = field(repr=False)
    tokenizer: Tokenizer = field(repr=False, compare=False)
    source: Path
    used: int
    notes: tuple[str, ...] = ()
    kind: str = "gpt2"
    scores: tuple[float, ...] = field(default=(), repr=False)
    spaces: str = ""

    @property
    def token_bytes(self) -> list[int]:
        """The length in bytes of the text of every token."""
        return kinds.token_bytes(self.kind, self.tokens, self.types)

    @property
    def bos_id(self) -> int | None:
        """The id of BOS, or None."""
        return self.special.get("bos")

    @property
    def first_id(self) -> int | None:
        """The id that goes before every text (BOS where it is added), or None."""
        return self.bos_id if self.add_bos else None

    @property
    def chat_template(self) -> str | None:
        """The default chat template's text, or None."""
        return self.chat.default or None

    @property
    def eos_id(self) -> int | None:
        """The id of EOS, or None."""
        return self.special.get("eos")

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing put before or after it."""
        return ids(self.tokenizer, texts, self.source)

    def render(self, messages: list[Any]) -> str:
        """A conversation in the model's own chat template; raises UsageError where that cannot be."""
        if not self.chat_template:
            raise UsageError("--calib-chat needs a chat template, and the model has none", where=self.source)
        tokens = {f"{kind}_token": self.tokens[at] for kind, at in self.special.items()}
        try:
            return chat_template.render(self.chat_template, messages, **tokens)
        except Unrendered as error:
            raise UsageError("cannot be written with the chat template", why=str(error)[:200]) from None


@dataclass(frozen=True)
class Tokens:
    """A folder's tokens: tokenizer.json with what the files beside it add, as text, parsed and opened."""

    path: Path
    text: str
    raw: dict[str, Any]
    kind: Kind
    library: Tokenizer
    vocab: dict[str, int]
    added: dict[int, AddedToken]
    notes: tuple[str, ...]


def read_tokens(folder: Path, config: Mapping[str, Any], rows: int) -> Tokens:
    """The tokens that transformers finds in a folder, those without one of `rows` embedding rows left out.

    `config` is tokenizer_config.json. Raises TokenizerError as `load_tokenizer` does.
    """
    path = folder / "tokenizer.json"
    rendering.start()
    text = read_text(path) if os.path.isfile(path) else _from_vocabulary(folder, config)
    raw, library = open_json(text, path)
    kind = kind_of(raw, path)
    vocab = read_vocab(raw["model"], path)
    own = added_tokens(raw, library, vocab, path)
    kept, stated, notes = without_rows(own, beside(folder, config), rows)
    if kept != own:
        vocab = {token: i for token, i in vocab.items() if i not in own or i in kept}
        raw = {**raw, "model": {**raw["model"], "vocab": vocab}}
        text = with_added(raw, kept)
        library = open_tokenizer(text, path)
    added, told = add(library, kept, stated, rows, folder)
    if added != kept:
        text = with_added(raw, added)
    return Tokens(path, text, raw, kind, library, vocab, added, (*notes, *told))


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> str:
    """The tokenizer.json of GPT-2's own class, from vocab.json and merges.txt, or of a tokenizer.model."""
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    kind, there = str(config.get("tokenizer_class")), all(os.path.isfile(path) for path in files)
    if there and kind in GPT2_CLASSES:
        merges = read_text(files[1]).splitlines()
        return gpt2_json(
            parse_object(read_text(files[0]), files[0]), merges, config.get("add_prefix_space") is True
        )
    if os.path.isfile(folder / "tokenizer.model"):
        return sentencepiece_model.to_json(folder / "tokenizer.model")
    why = f"vocab.json and merges.txt do not say how {kind[:40]!r} splits a text" if there else ""
    made = f"A.from_pretrained({str(folder)!r}).backend_tokenizer.save({str(folder / 'tokenizer.json')!r})"
    command = f'python -c "from transformers import AutoTokenizer as A; {made}"'
    raise TokenizerError(
        "there is no tokenizer.json",
        where=folder,
        why=why,
        hint=f"Make it: {command}" if there else "Fetch tokenizer.json, or save one with transformers",
    )


def load_tokenizer(folder: Path, rows: int, add_bos: bool | None = None) -> TokenizerData:
    """The tokenizer of a checkpoint folder for an embedding of `rows` rows.

    `add_bos` says whether BOS goes before a text, whatever the files say; None leaves it to them.
    Raises TokenizerError when the files are missing, damaged or contradict each other, when the tokenizer
    is of no kind that a GGUF file can state, and when it does something that no GGUF key can state.

    >>> from dsconvert.checkpoints.locate import locate
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> data.kind, data.special, data.add_bos
    ('gpt2', {'bos': 2000, 'eos': 2001, 'pad': 2001}, True)
    """
    config = read_object(folder / "tokenizer_config.json")
    found = read_tokens(folder, config, rows)
    path, raw, library, added = found.path, found.raw, found.library, found.added
    model, vocab, notes = raw["model"], found.vocab, list(found.notes)
    tokens, types, used = rows_of(vocab, added, rows, path)
    parts = found.kind.parts(raw, kinds.Vocabulary(tokens, types, vocab), path)
    known = {token: i for i, token in enumerate(tokens[:used]) if types[i] != UNUSED}
    control = [token.id for token in added.values() if token.special]
    named, named_notes = special_ids(folder, config, known, control)
    special = _with_unk(named, known, model)
    notes += named_notes
    chat = chat_template.collect(folder)
    names = {f"{name}_token": tokens[special[name]] if name in special else "" for name in ("bos", "eos")}
    notes += [*chat.notes, *chat_template.check(chat, **names)]
    texts = {i: token.content for i, token in added.items()}
    stops, stop_notes = stop_ids(folder, special.get("eos"), texts, chat.default, names)
    notes += [*stop_notes, *lost_stops(tokens, stops, special.get("eos"))]
    (adds_bos, adds_eos), added_notes = additions(library, config, special, path, add_bos)
    if add_bos is None and not adds_bos and names["bos_token"]:
        notes += lost_bos(config, names["bos_token"], chat.default)
    notes += [*added_notes, *parts.notes, *flag_notes(added)]
    return TokenizerData(
        tokens=tokens,
        types=parts.types,
        merges=parts.merges,
        added=tuple(added.values()),
        special=special,
        stops=stops,
        add_bos=adds_bos,
        add_eos=adds_eos,
        ignore_merges=parts.ignore_merges,
        normalizer=parts.normalizer,
        spec=parts.spec,
        chat=chat,
        json=found.text,
        tokenizer=library,
        source=path,
        used=used,
        notes=tuple(notes),
        kind=found.kind.model,
        scores=parts.scores,
        spaces=parts.spaces,
    )


def _with_unk(special: dict[str, int], known: Mapping[str, int], model: Mapping[str, Any]) -> dict[str, int]:
    """Adds the model's own unk_token where the configs name none."""
    unk = model.get("unk_token")
    return {"unk": known[unk], **special} if isinstance(unk, str) and unk in known else special
