"""Whether an output handles text as the checkpoint does: token ids, special tokens, chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError
from tokenizer_tools import spm
from tokenizer_tools.kinds import KINDS, SENTENCEPIECE
from tokenizer_tools.library import ids
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.raw import added_ids, end_ids
from tokenizer_tools.rebuild import GGML, ID_KEYS, rebuild
from tokenizer_tools.stops import ENDS_BY_NAME, STOP_KEYS, carried_stops

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TextHandling:
    """A tokenizer with what surrounds it; `template` is "" where there is none.

    `stops` are the ids that end a generation, `stated` the added tokens that the files of a folder state.
    Of a SentencePiece-like BPE `scores` has one for each token, `order` the tokens that merges make in the
    order of those merges (a folder's only), and `spaces` says how a space comes before a text (spm.py).
    """

    tokenizer: Tokenizer = field(repr=False, compare=False)
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    template: str = field(repr=False)
    stops: frozenset[int] = frozenset()
    stated: Mapping[str, int] = field(default_factory=dict, repr=False)
    scores: Sequence[float] = field(default=(), repr=False)
    order: Sequence[int] = field(default=(), repr=False)
    spaces: str = ""


@dataclass(frozen=True)
class Finding:
    """One thing compared, whether it is the same, a sentence about it, how many texts or ids differ."""

    name: str
    same: bool
    detail: str
    count: int


def of_data(data: TokenizerData) -> TextHandling:
    """A checkpoint folder's; what the files state is read from them again (see raw.py).

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> handling = of_data(data)
    >>> handling.add_bos, handling.stops
    (True, frozenset({2001}))
    """
    folder = data.source.parent
    stated = added_ids(folder, len(data.tokens))
    ends = carried_stops(data.tokens, (*data.stops, *end_ids(folder, stated)), data.eos_id)
    order = spm.merge_order(data.tokens, data.types, len(data.merges), data.scores) if data.scores else ()
    # What a checkpoint does not have a runtime takes from its defaults, and no key can forbid it.
    special = {**KINDS[data.kind].ids, **data.special}
    return TextHandling(
        data.tokenizer, special, data.add_bos, data.add_eos, data.chat.default, ends, stated,
        data.scores, order, data.spaces,
    )  # fmt: skip


def of_metadata(keys: Mapping[str, Any], where: object = "") -> TextHandling:
    """What a GGUF file's keys alone make a runtime do; raises TokenizerError.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> from tokenizer_tools.rebuild import gguf_keys
    >>> keys = {name: value for name, (_, value) in gguf_keys(data, "deepseek-llm").items()}
    >>> of_metadata(keys).special["bos"]
    2000
    """
    tokenizer = rebuild(keys, where)
    kind = KINDS[str(keys[GGML + "model"])]
    stated = {name: int(keys[key]) for name, key in ID_KEYS.items() if isinstance(keys.get(key), int)}
    special = {**kind.ids, **stated}
    by_default = kind.adds_bos(str(keys.get(GGML + "pre")))
    template = keys.get("tokenizer.chat_template", "")
    ends = {special["eos"]} if "eos" in special else set()
    ends |= {keys[key] for key in STOP_KEYS if isinstance(keys.get(key), int)}
    tokens = keys.get(GGML + "tokens")
    named = enumerate(tokens) if isinstance(tokens, list) else ()
    ends |= {i for i, token in named if isinstance(token, str) and token in ENDS_BY_NAME}
    return TextHandling(
        tokenizer,
        special,
        bool(keys.get(GGML + "add_bos_token", by_default)),
        bool(keys.get(GGML + "add_eos_token", False)),
        template if isinstance(template, str) else "",
        frozenset(ends),
        scores=keys[GGML + "scores"] if kind is SENTENCEPIECE else (),
    )


def findings(reference: TextHandling, other: TextHandling, texts: Sequence[str]) -> list[Finding]:
    """What `other` does with the texts, around them and in a chat, against the reference.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> handling = of_data(data)
    >>> [finding.name for finding in findings(handling, handling, ["a text"]) if finding.same]
    ['token ids', 'added tokens', 'special tokens', 'chat template']
    """
    return [
        same_ids(reference, other, texts),
        same_added(reference, other),
        same_special(reference, other),
        same_template(reference, other),
    ]


def same_ids(reference: TextHandling, other: TextHandling, texts: Sequence[str]) -> Finding:
    """The token ids of every text."""
    own, found = ids(reference.tokenizer, texts), ids(other.tokenizer, texts)
    wrong = [text for text, a, b in zip(texts, own, found, strict=True) if a != b]
    detail = f"same ids on {len(texts)} texts ({sum(map(len, texts)):,} characters)"
    if wrong:
        shortest = min(wrong, key=len)
        detail = f"token ids differ on {len(wrong)} of {len(texts)} texts, for example {shortest[:40]!a}"
    # Texts cannot try every score, and tokens that are merged in the same order give the same ids on all.
    moved = spm.out_of_order(reference.order, other.scores) if other.scores else []
    if moved:
        detail += f"; {len(moved)} tokens are merged in another order than the checkpoint's, first {moved[0]}"
    return Finding("token ids", not wrong and not moved, detail, len(wrong) + len(moved))


def same_added(reference: TextHandling, other: TextHandling) -> Finding:
    """Every added token that the checkpoint's files state is one token of its id."""
    found = ids(other.tokenizer, list(reference.stated))
    wrong = [
        f"{text[:40]!a} is {got[:4]}, the checkpoint's files say {i}"
        for (text, i), got in zip(reference.stated.items(), found, strict=True)
        if got != [i]
    ]
    detail = f"all {len(found)} of the checkpoint's files are tokens of their ids"
    return Finding("added tokens", not wrong, "; ".join(wrong[:3]) or detail, len(wrong))


def same_special(reference: TextHandling, other: TextHandling) -> Finding:
    """BOS and EOS: their ids, whether they are put around a text, and where a generation ends."""
    wrong = []
    for name in ("bos", "eos"):
        own, found = reference.special.get(name), other.special.get(name)
        if own != found:
            wrong.append(f"{name.upper()} is {found}, the checkpoint has {own}")
        own_flag, flag = getattr(reference, f"add_{name}"), getattr(other, f"add_{name}")
        if own_flag != flag:
            wrong.append(f"{name.upper()} is {'' if flag else 'not '}added, the checkpoint says otherwise")
    lost = sorted(reference.stops - other.stops)
    if lost:
        wrong.append(f"a generation does not end at {lost[:8]}, the checkpoint's does")
    added = [name.upper() for name in ("bos", "eos") if getattr(reference, f"add_{name}")]
    detail = f"BOS and EOS are the checkpoint's; added: {', '.join(added) or 'none'}"
    return Finding("special tokens", not wrong, "; ".join(wrong) or detail, len(wrong))


def same_template(reference: TextHandling, other: TextHandling) -> Finding:
    """The default chat template, to the character."""
    if reference.template == other.template:
        detail = "carried unchanged" if reference.template else "none in the checkpoint"
        return Finding("chat template", True, detail, 0)
    if not other.template:
        return Finding("chat template", False, "the chat template is missing", 1)
    detail = "the chat template differs from the checkpoint's"
    if not reference.template:
        detail = "has a chat template, the checkpoint has none"
    return Finding("chat template", False, detail, 1)


def comparable(reference: TextHandling, texts: Sequence[str]) -> list[str]:
    """The texts before which llama.cpp puts a space just where the checkpoint's tokenizer does."""
    return [text for text in texts if not spm.foreseen(reference.spaces, text)]


def same_runtime(reference: TextHandling, keys: Mapping[str, Any], texts: Sequence[str]) -> Finding:
    """What llama.cpp does under the name in `tokenizer.ggml.pre`, whatever else the file carries."""
    texts = comparable(reference, texts)
    standard = {key: value for key, value in keys.items() if key.startswith((GGML, "tokenizer.chat"))}
    name = str(keys.get(GGML + "pre"))
    try:
        found = same_ids(reference, of_metadata(standard), texts)
    except TokenizerError:
        return Finding("pre-tokenizer", False, f"llama.cpp's pre-tokenizer {name!r} is not known here", 1)
    detail = f"llama.cpp's {name!r} gives the {found.detail}"
    if not found.same:
        detail = f"under the name {name!r} llama.cpp's {found.detail}"
    return Finding("pre-tokenizer", found.same, detail, found.count)
