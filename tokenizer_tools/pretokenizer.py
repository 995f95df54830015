"""From a tokenizer to GGUF keys and back; the runtime's name for its pre-tokenizer, by proof."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from dsconvert.errors import TokenizerError
from tokenizer_tools import parity
from tokenizer_tools.kinds import BYTE_LEVEL, SENTENCEPIECE
from tokenizer_tools.library import ids, same_pieces, splitter
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.rebuild import gguf_keys, rebuild
from tokenizer_tools.resolution import Difference, Resolution, first_difference
from tokenizer_tools.runtimes import RUNTIMES, Runtime, by_name
from tokenizer_tools.score_proof import resolve_scores
from tokenizer_tools.special import byte_alphabet
from tokenizer_tools.steps import PreTokenizer, Step, extract, from_gguf, to_gguf
from tokenizer_tools.vocabulary import NORMAL, SPACE

__all__ = [
    "PreTokenizer",
    "Resolution",
    "Step",
    "extract",
    "from_gguf",
    "gguf_keys",
    "rebuild",
    "resolve",
    "to_gguf",
]


class _Proof:
    """What the runtimes' steps give on the probe texts and on the texts of the model's tokens."""

    def __init__(self, data: TokenizerData) -> None:
        self.data = data
        self.tokens = token_texts(data)
        self.encoded = 0

    def difference(self, row: Runtime, texts: Sequence[str]) -> Difference | None:
        """The first text where the runtime's steps give other ids."""
        own = ids(self.data.tokenizer, texts, self.data.source)
        with behaving_as(row, self.data):
            other = ids(self.data.tokenizer, texts, self.data.source)
        return first_difference(texts, own, other)

    def undecided(self, row: Runtime) -> Sequence[str]:
        """The tokens' texts that the runtime may split or merge differently.

        All of them, unless the runtime is known to start from the model's very steps: encoding 100,000
        texts twice takes seconds, and most hold nothing that the two step lists treat differently.
        """
        if row.source != self.data.spec or row.ignore_merges != self.data.ignore_merges:
            return self.tokens
        return row.split_otherwise(self.tokens)

    def failure(self, row: Runtime) -> Difference | None:
        """None when the runtime has the model's own ids on all texts."""
        texts = self.undecided(row)
        self.encoded = len(texts)
        return self.difference(row, parity.PROBES) or self.difference(row, texts)

    def evidence(self) -> str:
        return (
            f"same ids on {len(parity.PROBES)} probe texts and on the texts of {len(self.tokens):,} tokens "
            f"({self.encoded:,} encoded, the others split alike)"
        )


@contextmanager
def behaving_as(row: Runtime, data: TokenizerData) -> Iterator[None]:
    """The model's tokenizer with the steps of a runtime, for a while (a second one takes long to make)."""
    own = splitter(data.spec, data.source)
    try:
        data.tokenizer.pre_tokenizer = splitter(row.runtime, data.source)
        data.tokenizer.model.ignore_merges = row.ignore_merges
        yield
    finally:
        data.tokenizer.pre_tokenizer = own
        data.tokenizer.model.ignore_merges = data.ignore_merges


def token_texts(data: TokenizerData) -> list[str]:
    """The text of every normal token whose bytes are UTF-8: words that a runtime must keep whole."""
    alphabet = byte_alphabet()
    table = {ord(char): byte for byte, char in alphabet.items()}
    known = set(alphabet.values())
    texts = []
    for token, kind in zip(data.tokens, data.types, strict=True):
        if kind != NORMAL:
            continue
        word = token.removeprefix(SPACE)
        if word.isascii() and word.isprintable() and " " not in word:
            # Most of them, and the alphabet leaves such characters as they are.
            texts.append(token.replace(SPACE, " ", 1))
        elif known.issuperset(token):
            try:
                texts.append(token.translate(table).encode("latin-1").decode("utf-8"))
            except UnicodeDecodeError:
                continue
    return texts


def resolve(data: TokenizerData, override: str | None = None) -> Resolution:
    """The name to write as `tokenizer.ggml.pre`, by proof that the runtime gives the tokenizer's ids.

    `override` is a name for a byte-level BPE's pre-tokenizer. Raises TokenizerError when nothing fits, with
    the first text that differs.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> found = resolve(data)
    >>> found.name, found.proven
    ('deepseek-llm', True)
    """
    return RESOLVERS[data.kind](data, override)


def resolve_steps(data: TokenizerData, override: str | None) -> Resolution:
    """A byte-level BPE's, by fingerprint of the steps and by proof.

    The proof: the regexes that the runtime runs under that name, run here on this model's vocabulary and
    merges, give the same ids as the model's own steps on the probe texts and on the text of every token.
    `override` is taken as it is, with a note when the proof fails or the name is not known here. Raises
    TokenizerError when nothing fits, with the pattern and the first text that differ.
    """
    proof = _Proof(data)
    if override is not None:
        return _overridden(override, proof)
    matching = [row for row in RUNTIMES if row.source == data.spec]
    for row in sorted(matching, key=lambda row: row.ignore_merges != data.ignore_merges):
        if proof.failure(row) is None:
            evidence = f"known steps {data.spec.sha256[:12]}; {proof.evidence()}"
            return Resolution(row.name_with(_bos(data)), True, evidence)
    fitting = [row for row in RUNTIMES if proof.difference(row, parity.PROBES) is None]
    for same in (_same_pieces, _same_flag):
        if len(fitting) > 1:
            fitting = [row for row in fitting if same(row, data)] or fitting
    if len(fitting) == 1 and proof.failure(fitting[0]) is None:
        name = fitting[0].name_with(_bos(data))
        evidence = f"steps {data.spec.sha256[:12]} are not known, those of {name} fit; {proof.evidence()}"
        note = (
            f"the pre-tokenizer's steps are not known; {name} was chosen because it gives the same ids on "
            "every text tried"
        )
        return Resolution(name, True, evidence, (note,))
    raise _unresolved(fitting, matching, proof)


RESOLVERS: dict[str, Callable[[TokenizerData, str | None], Resolution]] = {
    BYTE_LEVEL.model: resolve_steps,
    SENTENCEPIECE.model: resolve_scores,
}


def _bos(data: TokenizerData) -> str | None:
    return None if data.bos_id is None else data.tokens[data.bos_id]


def _overridden(name: str, proof: _Proof) -> Resolution:
    row = by_name(name)
    if row is None:
        note = f"the pre-tokenizer name {name!r} is not known here and was written unproven"
        return Resolution(name, False, "named by the user, not known here", (note,))
    failure = proof.failure(row)
    if failure is None:
        return Resolution(name, True, f"named by the user; {proof.evidence()}")
    note = (
        f"the pre-tokenizer {name!r} gives other ids than the checkpoint's own on {failure.count} of "
        f"{failure.total} texts: {failure}"
    )
    return Resolution(name, False, "named by the user against the proof", (note,))


def _same_pieces(row: Runtime, data: TokenizerData) -> bool:
    """Whether the runtime's steps split the probes into the same pieces, whatever the vocabulary."""
    own, other = splitter(data.spec, data.source), splitter(row.runtime, data.source)
    return same_pieces(own, other, parity.PROBES, data.source)


def _same_flag(row: Runtime, data: TokenizerData) -> bool:
    return row.ignore_merges == data.ignore_merges


def _unresolved(fitting: list[Runtime], matching: list[Runtime], proof: _Proof) -> TokenizerError:
    """The error when no row, or more than one, is proven."""
    data = proof.data
    hint = "If you know the runtime's name for it, give it with --pre NAME"
    if len(fitting) > 1:
        names = ", ".join(row.name for row in fitting)
        return TokenizerError(
            "the pre-tokenizer is none that is known, and this vocabulary cannot tell those known apart",
            where=data.source,
            why=f"{names} give the same ids on the probe texts",
            hint=hint,
        )
    rows = fitting or matching or list(RUNTIMES)
    failures = [(row, proof.failure(row)) for row in rows]
    nearest, failure = min(failures, key=lambda pair: pair[1].count if pair[1] else 0)
    return TokenizerError(
        "no known runtime pre-tokenizer gives this tokenizer's ids",
        where=data.source,
        why=f"The nearest is {nearest.name}: {_pattern(data.spec, nearest)}{failure}",
        hint=hint,
    )


def _pattern(spec: PreTokenizer, row: Runtime) -> str:
    """Which step differs from the row's, in words."""
    for n, step in enumerate(spec.steps):
        other = row.source.steps[n] if n < len(row.source.steps) else None
        if step != other:
            theirs = "none" if other is None else f"{other.type} {other.regex[:60]!r}"
            return f"step {n + 1} is {step.type} {step.regex[:60]!r} (there {theirs}), and "
    if len(spec.steps) != len(row.source.steps):
        return "it has more steps, and "
    return "its steps are the same, the vocabulary has words that it splits, and "
