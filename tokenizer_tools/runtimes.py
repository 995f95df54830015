"""What known runtimes do under each name of `tokenizer.ggml.pre`: lists of regexes, as data.

`source` is the step list as the models' tokenizer.json states it; `runtime` the list that llama.cpp runs
for that name (src/llama-vocab.cpp), written for the same regex engine. The two may be spelled differently
(llama.cpp's engine has no inline flags) or even split differently where the models' vocabularies cannot
tell (deepseek-llm's digits). Every non-ASCII character is escaped: typing or normalising such a pattern
anew changes it (NFC alone turns U+2126, U+212A and U+1F7D into other characters).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizer_tools.steps import GPT2_REGEX, PreTokenizer, Step

# The letters that DeepSeek LLM's training code listed one by one: 2,729 of them, all cased.
CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    "\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    "\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CONTRACTIONS_SPELLED = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = _WORDS + r"|\p{N}{1,3}" + _TAIL
QWEN2 = _WORDS + r"|\p{N}" + _TAIL
MINICPM5 = _WORDS + r"|\p{N}+" + _TAIL
QWEN35 = (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_V3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
SEED_CODER = "|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
DEEPSEEK_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
NUMBER_OR_NEW = ("Nd", "Nl", "No", "Cn")
DIGITS = Step("digits", behavior="isolated")
BYTES = Step("bytelevel")
GPT2 = Step("bytelevel", GPT2_REGEX, "isolated")


@dataclass(frozen=True)
class Runtime:
    """One behaviour of a runtime and the name that asks for it.

    `ignore_merges`: a piece that is a token is taken whole before any merge. `aliases` are the other
    names with the same regexes and the same `ignore_merges`; of these `by_bos` holds the ones that models
    with a certain BOS have, by its text.
    """

    name: str
    source: PreTokenizer
    runtime: PreTokenizer
    ignore_merges: bool = False
    aliases: tuple[str, ...] = ()
    by_bos: Mapping[str, str] = field(default_factory=dict)

    def name_with(self, bos: str | None) -> str:
        """The name that models with this BOS have.

        >>> by_name("qwen2").name_with(DEEPSEEK_BOS), by_name("qwen2").name_with(None)
        ('deepseek-r1-qwen', 'qwen2')
        """
        return self.by_bos.get(bos or "", self.name)

    def split_otherwise(self, texts: Iterable[str]) -> list[str]:
        """The texts that `source` and `runtime` may split differently.

        None where they are the same steps; else those with a number (one digit at a time in one, runs in
        the other) or an apostrophe (contractions spelled out): all else is the same pattern in both. A
        character that this Python does not know may be a number to the regex engine.
        """
        if self.source == self.runtime:
            return []
        return [text for text in texts if not text.strip().isalpha() and any(map(_decides, text))]


def _decides(char: str) -> bool:
    return char == "'" or unicodedata.category(char) in NUMBER_OR_NEW


def _spec(*steps: str | Step) -> PreTokenizer:
    return PreTokenizer(tuple(Step("split", s, "isolated") if isinstance(s, str) else s for s in steps))


def _known(
    name: str,
    source: PreTokenizer,
    *runtime: str,
    ignore_merges: bool = False,
    aliases: tuple[str, ...] = (),
    by_bos: Mapping[str, str] | None = None,
) -> Runtime:
    """A row; without `runtime` patterns the runtime does what the source says, step by step."""
    steps = _spec(*runtime, BYTES) if runtime else source
    return Runtime(name, source, steps, ignore_merges, aliases, by_bos or {})


DEEPSEEK_LLM_SPLITS = (
    "[\r\n]",
    "\\s?[" + CASED_LETTERS + "]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    "\\s+$",
    CJK,
)
DEEPSEEK_CODER_SPLITS = ("[\r\n]", "\\s?\\p{L}+", "\\s?\\p{P}+", CJK)
DEEPSEEK_V3_SPLITS = ("\\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_V3)

RUNTIMES = (
    _known(
        "deepseek-llm",
        _spec(*DEEPSEEK_LLM_SPLITS, DIGITS, BYTES),
        *DEEPSEEK_LLM_SPLITS,
        r"\p{N}+",
    ),
    _known(
        "deepseek-coder",
        _spec(*DEEPSEEK_CODER_SPLITS, DIGITS, BYTES),
        *DEEPSEEK_CODER_SPLITS,
        r"\p{N}",
    ),
    _known(
        "deepseek-v3",
        _spec(*DEEPSEEK_V3_SPLITS, BYTES),
        *DEEPSEEK_V3_SPLITS,
        aliases=("hunyuan-dense", "joyai-llm", "hy_v4"),
    ),
    _known(
        "gpt-2",
        _spec(GPT2),
        GPT2_REGEX,
        aliases=(
            *("phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
            *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum", "modern-bert"),
        ),
    ),
    _known(
        "smollm",
        _spec(DIGITS, GPT2),
        r"\p{N}",
        GPT2_REGEX,
        aliases=("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    _known(
        "llama-bpe",
        _spec(CONTRACTIONS + LLAMA3, BYTES),
        CONTRACTIONS_SPELLED + LLAMA3,
        ignore_merges=True,
        aliases=(
            *("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
    ),
    _known(
        "dbrx",
        _spec(CONTRACTIONS + LLAMA3, BYTES),
        CONTRACTIONS_SPELLED + LLAMA3,
        aliases=("smaug-bpe", "glm4", "chatglm-bpe"),
    ),
    _known(
        "qwen2",
        _spec(CONTRACTIONS + QWEN2, BYTES),
        CONTRACTIONS_SPELLED + QWEN2,
        aliases=(
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "stablelm2",
            "hunyuan",
            "megrez",
            "solar-open",
            "grok-2",
        ),
        by_bos={DEEPSEEK_BOS: "deepseek-r1-qwen"},
    ),
    _known("qwen35", _spec(CONTRACTIONS + QWEN35, BYTES), CONTRACTIONS_SPELLED + QWEN35),
    _known("seed-coder", _spec(CONTRACTIONS + SEED_CODER, BYTES), CONTRACTIONS_SPELLED + SEED_CODER),
    _known(
        "minicpm5",
        _spec(r"\p{N}{1,3}", CONTRACTIONS + MINICPM5, BYTES),
        r"\p{N}{1,3}",
        CONTRACTIONS_SPELLED + MINICPM5,
        ignore_merges=True,
    ),
)


def by_name(name: str) -> Runtime | None:
    """The row that a `tokenizer.ggml.pre` name asks for, by its own name or an alias; None if unknown.

    >>> by_name("deepseek-coder").name, by_name("unknown")
    ('deepseek-coder', None)
    """
    return next((row for row in RUNTIMES if name == row.name or name in row.aliases), None)
