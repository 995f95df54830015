"""The proof that llama.cpp, which merges by score, gives the ids of a SentencePiece-like BPE's merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dsconvert.errors import TokenizerError
from tokenizer_tools import spm
from tokenizer_tools.kinds import SENTENCEPIECE
from tokenizer_tools.library import ids
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.rebuild import GGML, gguf_keys, rebuild
from tokenizer_tools.resolution import Difference, Resolution, first_difference
from tokenizer_tools.samples import PROBES
from tokenizer_tools.vocabulary import BYTE, NORMAL

NAME = "default"  # what llama.cpp's converter writes as tokenizer.ggml.pre, and its runtime does not read
AROUND = ("{}a", "{} a", "a{}", "a {} b", "{}{}")  # places of an added token in a text
TRIED = 64  # added tokens that are tried there


def resolve_scores(data: TokenizerData, override: str | None) -> Resolution:
    """By proof on the probes and on the text of every token, which decides for all texts (see spm.py).

    Raises TokenizerError where ids differ, with the first text that does; notes report texts that begin
    with a space, or hold added tokens, where the runtime puts a space that the tokenizer does not.
    """
    if override is not None:
        raise TokenizerError(
            f"has no pre-tokenizer that --pre {override} could name",
            where=data.source,
            why="it is a SentencePiece-like BPE, whose text no runtime splits",
            hint="Leave --pre out",
        )
    texts, words, differs = provable(data), token_texts(data), against_scores(data)
    wrong = differs([*texts, *words])
    if wrong is not None:
        raise TokenizerError(
            f"llama.cpp, which merges by score, gives other ids on {wrong.count} of {wrong.total} texts",
            where=data.source,
            why=f"{wrong}; merges and vocabulary are not of one SentencePiece model",
            hint="No GGUF file can make llama.cpp tokenize as this file does",
        )
    evidence = f"same ids on {len(texts)} probe texts and on the texts of {len(words):,} tokens"
    return Resolution(
        NAME, True, evidence, (*_defaults(data), *_notes(differs([" a"]), differs(_around(data))))
    )


def against_scores(data: TokenizerData) -> Callable[[Sequence[str]], Difference | None]:
    """What gives the first text on which the standard's keys alone make a runtime give other ids, or None."""
    keys = {key: value for key, (_, value) in gguf_keys(data, NAME).items() if key.startswith(GGML)}
    runtime = rebuild(keys, data.source)

    def differs(texts: Sequence[str]) -> Difference | None:
        own, other = (ids(t, texts, data.source) for t in (data.tokenizer, runtime))
        return first_difference(texts, own, other)

    return differs


def provable(data: TokenizerData) -> list[str]:
    """The probes before which llama.cpp puts a space just where the tokenizer does."""
    return [text for text in PROBES if not spm.foreseen(data.spaces, text)]


def token_texts(data: TokenizerData) -> list[str]:
    """The text of every token behind a character that merges with nothing; alone too where that matters."""
    used = set("".join(data.tokens))
    apart = next(char for char in map(chr, range(0xE000, 0x110000)) if char not in used)
    own = [token for token, kind in zip(data.tokens, data.types, strict=True) if kind in (NORMAL, BYTE)]
    texts = [apart + token.replace(spm.SPACE, " ") for token in own]
    if data.ignore_merges:
        prefixed = data.spaces != spm.NEVER
        alone = [token.removeprefix(spm.SPACE) if prefixed else token for token in own]
        texts += [text.replace(spm.SPACE, " ") for text in alone]
    return [text for text in texts if not spm.foreseen(data.spaces, text)]


def _around(data: TokenizerData) -> list[str]:
    """Texts with added tokens in them."""
    return [form.replace("{}", token.content) for token in data.added[:TRIED] for form in AROUND]


def _defaults(data: TokenizerData) -> list[str]:
    """A note for each of BOS and EOS that the files do not name and llama.cpp takes all the same."""
    taken = {name: i for name, i in SENTENCEPIECE.ids.items() if name != "unk" and name not in data.special}
    return [
        f"the files name no {name.upper()}; llama.cpp takes the token {i}, {data.tokens[i][:40]!r}"
        for name, i in taken.items()
    ]


def _notes(spaced: Difference | None, added: Difference | None) -> list[str]:
    notes = []
    if spaced is not None:
        notes.append(
            "llama.cpp puts a space before a text that begins with one too, this tokenizer does not: "
            f"{spaced}"
        )
    if added is not None:
        notes.append(f"llama.cpp gives other ids around added tokens: {added}")
    return notes
