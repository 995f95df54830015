"""Texts to try tokenizers on: fixed probes, and random texts over all of Unicode."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

# Texts that separate the known pre-tokenizers pairwise: code, symbols, digits, scripts, whitespace, emoji.
PROBES = (
    "foo_bar->baz::qux<T>()",
    "x = a+b; y<=z && w!=v || $HOME",
    "if (a[i]==b[j]) { return f(x,y)*2; } // done!\n\n\treturn 0;\n",
    "def f(x):\n    '''doc'''\n    return {\"k\": [1, 22, 333, 4444]}\n\n\n",
    "3 33 333 3333 33333 333333 1234567890 3.14159 1,000,000",
    "in 1969  12 items,   345 more 6th x86_64 v2.0.1-rc3 0xDEADBEEF",
    "I've been 'told he's there, 'RE you sure? 'M not sure I'LL make it, we'd've",
    "Hello, world! Hello World  two   three    four ",
    " leading and trailing \t tabs\t\tand\r\nCRLF \r\n\r\n",
    "\n\n \n  \n   x\n \ty",
    '................!!!!!!?????? ------======= ``````"""" ~~ ^^ ## @@ %%',
    "#include <stdio.h> @decorator @user #tag $var ${x} a@b.com https://x.y/z?q=1&r=2",
    (
        "\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e\u3002\u4f60\u597d\uff0c\u4e16\u754c\uff01"
        "\u201c\u5f15\u53f7\u201d"
    ),
    (
        "\u65e5\u672c\u8a9e\u306e\u30c6\u30b9\u30c8\u3067\u3059\u3001\u6f22\u5b57\u3068\u304b\u306a\u3002"
        " \ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc785\ub2c8\ub2e4."
    ),
    (
        "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e \u092e\u0947\u0902 \u0967\u0968"
        "\u0969\u096a \u0915\u094d\u0937\u0947\u0924\u094d\u0930 \u09ac\u09be\u0982\u09b2\u09be \u0ba4"
        "\u0bae\u0bbf\u0bb4\u0bcd"
    ),
    (
        "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f "
        "\u0661\u0662\u0663\u0664\u060c \u05e2\u05d1\u05e8\u05d9\u05ea \u05e9\u05b8\u05c1\u05dc\u05d5"
        "\u05b9\u05dd"
    ),
    (
        "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e41\u0e25\u0e30\u0e2a\u0e23\u0e30 \u0e17\u0e35"
        "\u0e48\u0e19\u0e35\u0e48 \u0e51\u0e52\u0e53 \u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7"
        "\u179f\u17c1\u179f"
    ),
    (
        "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u0442\u0435\u043a\u0441\u0442 \u0434\u043b\u044f "
        "\u041f\u0440\u043e\u0432\u0435\u0440\u043a\u0438, \u0395\u03bb\u03bb\u03b7\u03bd\u03b9\u03ba"
        "\u03ac \u043d\u0435\u0449\u043e"
    ),
    "Stra\xdfe \xc4pfel F\xfchrer na\xefve caf\xe9 \xf8re e\u0301 n\u0303o a\u0308 \u0130stanbul",
    (
        "\U0001f680 (normal) \U0001f636\u200d\U0001f32b\ufe0f \u2705 \U0001f999\U0001f999 \U0001f468"
        "\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea"
    ),
    (
        "\u2200x\u2208\u211d: \u2211x\xb2 \u2260 \u221e \u20ac100 \xa35 \xbd \u2167 \u2460 \xa9\u2122 "
        "\u2192\u2190 \u2554\u2550\u2557"
    ),
    "a\xa0b\u3000c\u2003d\u2028e\u200bf\x85g\ufeffh \xa0 \u3000 x",
    "end \n\n\nnext\n\n  indented\r\rold mac \x0b\x0c\x00\x1f\x7f",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE dot.case a.b.c(d)[e]{f}",
    "  a\n  b \n c",
    "$100 +5 <tag> a=b | c ^ d `e` ~f \u20ac5 x\xd7y",
    "word!\nnext line?\n\nlast.\r\n",
)

# Scripts and blocks, as inclusive ranges, that random texts are drawn from one block at a time.
BLOCKS = (
    (0x20, 0x7E), (0xA0, 0xFF), (0x100, 0x24F), (0x250, 0x2FF), (0x300, 0x36F), (0x370, 0x3FF),
    (0x400, 0x52F), (0x530, 0x5FF), (0x600, 0x6FF), (0x700, 0x8FF), (0x900, 0x97F), (0x980, 0xDFF),
    (0xE00, 0xE7F), (0xE80, 0x109F), (0x10A0, 0x11FF), (0x1200, 0x13FF), (0x1400, 0x17FF),
    (0x1800, 0x1CFF), (0x1D00, 0x1FFF), (0x2000, 0x206F), (0x2070, 0x218F), (0x2190, 0x23FF),
    (0x2400, 0x27BF), (0x27C0, 0x2BFF), (0x2C00, 0x2DFF), (0x2E00, 0x303F), (0x3040, 0x30FF),
    (0x3100, 0x33FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA4CF), (0xA4D0, 0xABFF),
    (0xAC00, 0xD7FF), (0xE000, 0xF8FF), (0xF900, 0xFAFF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFF),
    (0x10000, 0x10FFF), (0x11000, 0x11FFF), (0x12000, 0x16FFF), (0x17000, 0x1CFFF),
    (0x1D000, 0x1E8FF), (0x1E900, 0x1FAFF), (0x1FB00, 0x1FFFF), (0x20000, 0x323AF), (0xE0000, 0xE01EF),
)  # fmt: skip
SPACES = " \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2000\u2003\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
NEAR_SPACES = "\u200b\u200c\u200d\u2060\ufeff\u180e\u00ad"
EMOJI = "\U0001f600\U0001f680\U0001f999\u2705\u2764\ufe0f\u200d\U0001f468\U0001f469\U0001f1e9\U0001f3fd"
DIGITS = "0123456789\u0661\u0967\uff11\u00bd\u00b2\u2167\u2460\u0e51\U0001d7d9"
_WORDS = """
the of and def return self import class public static void int main if else for while None true function const
let var std vector string print lambda yield async await null include using I've don't it's we'll THEY'RE
o'clock foo_bar camelCase HTTPServer x86 v2 utf8
"""
_OPERATORS = """
+ - * / = == != <= >= && || -> :: << >> ( ) [ ] { } ; , . : ? ! # @ $ % ^ & ~ ` ' " \\ | _
"""
WORDS, OPERATORS = tuple(_WORDS.split()), tuple(_OPERATORS.split())


def random_texts(seed: int, count: int, added: Sequence[str] = ()) -> Iterator[str]:
    """`count` random texts over all of Unicode but surrogates, the same for the same seed.

    Each mixes one to six parts: random code points, one script's block, code, whitespace of all kinds,
    digits, emoji, words, and the contents of `added` tokens.

    >>> len(list(random_texts(seed=0, count=3))), list(random_texts(0, 3)) == list(random_texts(0, 3))
    (3, True)
    """
    rng = random.Random(seed)
    makers: list[Callable[[random.Random], str]] = [
        lambda r: "".join(map(_point, [r] * r.randint(1, 8))),
        _from_block,
        _from_block,
        _code,
        lambda r: "".join(r.choices(SPACES, k=r.randint(1, 4))),
        lambda r: "".join(r.choices(SPACES + NEAR_SPACES + " \n\n  ab.", k=r.randint(1, 6))),
        lambda r: "".join(r.choices(DIGITS, k=r.randint(1, 8))),
        lambda r: "".join(r.choices(EMOJI, k=r.randint(1, 4))),
        lambda r: " ".join(r.choices(WORDS, k=r.randint(1, 4))),
    ]
    if added:
        makers.append(lambda r: r.choice(added))
    for _ in range(count):
        yield "".join(rng.choice(makers)(rng) + rng.choice(("", " ", "")) for _ in range(rng.randint(1, 6)))


def _point(rng: random.Random) -> str:
    point = rng.randrange(0x110000 - 0x800)
    return chr(point if point < 0xD800 else point + 0x800)


def _from_block(rng: random.Random) -> str:
    low, high = rng.choice(BLOCKS)
    return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 10)))


def _code(rng: random.Random) -> str:
    parts = [
        rng.choice(WORDS) if rng.random() < 0.5 else rng.choice(OPERATORS) for _ in range(rng.randint(1, 8))
    ]
    return rng.choice(("", " ", "  ")).join(parts) + rng.choice(("", "\n", "\n\t", ";\n    "))
