"""A model card: README.md with what was measured of some outputs, by which command, against what.

The same facts stand in it a second time, as JSON in a comment: by that a card is known for one of ours, and
the next output beside the first adds its own lines.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconvert.errors import ConversionError
from dsconvert.reading import parse_json, read_text

LIMIT = 8 << 20
MARK = "<!-- dsconvert "
FACTS = re.compile(re.escape(MARK) + r"(\{.*\}) -->")
HUB = "https://huggingface.co"
COLUMNS = (
    "output",
    "MB",
    "bits per weight",
    "PPL",
    "PPL ratio",
    "mean KLD",
    "99 % KLD",
    "same top token",
    "checks",
)
# Of a kind of output: the library that reads it, and how it is used.
LIBRARIES = {"GGUF": "gguf", "GPTQ": "transformers", "EXL2": "exllamav2", "MLX": "mlx"}
LIBRARIES["compressed-tensors"] = "transformers"


@dataclass(frozen=True)
class Entry:
    """One output: what it is, what was measured, and how it was made.

    `files` are bytes and sha256 by name; `figures` are those of a run of the whole model, None where that was
    not done; `checks` are name, passed and detail; `provenance` is the proof's.
    """

    name: str
    kind: str
    quant: str
    nbytes: int
    bits: float
    passed: bool
    model: str
    base: str
    commit: str
    command: str
    license: str = ""
    figures: Mapping[str, Any] | None = None
    checks: tuple[tuple[str, bool, str], ...] = ()
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


def entries_of(text: str) -> tuple[Entry, ...] | None:
    """The outputs that a card of ours tells of; None for another text."""
    found = FACTS.search(text)
    if found is None:
        return None
    try:
        return tuple(_entry(value) for value in parse_json(found[1], "README.md")["outputs"])
    except (ConversionError, TypeError, KeyError, ValueError, AttributeError):
        return None


def _entry(value: dict[str, Any]) -> Entry:
    checks = tuple((str(name), bool(passed), str(detail)) for name, passed, detail in value.pop("checks"))
    files = {str(name): (int(size), str(digest)) for name, (size, digest) in value.pop("files").items()}
    return Entry(**value, checks=checks, files=files)


def is_card(path: Path) -> bool:
    """Whether a file is a card that dsconvert made."""
    try:
        return entries_of(read_text(path, LIMIT)) is not None
    except ConversionError:
        return False


def merged(before: Iterable[Entry], made: Iterable[Entry]) -> tuple[Entry, ...]:
    """The outputs of a card and new ones, which take the place of those of the same name."""
    return tuple({entry.name: entry for entry in (*before, *made)}.values())


def render(entries: Iterable[Entry]) -> str:
    """The card of some outputs, as Markdown with the hub's front matter."""
    entries = tuple(entries)
    first = entries[-1]
    kinds = list(dict.fromkeys(entry.kind for entry in entries))
    parts = [
        _front_matter(entries, kinds),
        f"# {_cell(first.model)}, {', '.join(kinds)}",
        "\n".join(_origin(entry) for entry in {e.base: e for e in entries}.values()),
        "## Measured",
        _table(COLUMNS, map(_measured, entries)),
        "\n".join(dict.fromkeys(_how(entry) for entry in entries)),
        "## Files",
        _table(
            ("file", "bytes", "sha256"),
            [(n, f"{s:,}", f"`{d}`") for e in entries for n, (s, d) in e.files.items()],
        ),
        "## How it was made",
        "\n".join(dict.fromkeys(f"    {_line(entry.command)}" for entry in entries)),
        "and how it is proven again:",
        "\n".join(f"    {_line(verification(entry))}" for entry in entries),
        "## Checks",
        *(
            f"{_cell(entry.name)}:\n\n{_table(('', 'check', 'found'), map(_check, entry.checks))}"
            for entry in entries
        ),
        f"{MARK}{_facts(entries)} -->",
    ]
    return "\n\n".join(parts) + "\n"


def verification(entry: Entry) -> str:
    """The command that proves an output again."""
    asked = entry.provenance.get("reference", "MODEL_PATH")
    against = f"{entry.base}@{entry.commit}" if entry.base and entry.commit else asked
    return shlex.join(["dsconvert", "verify", entry.name, "--against", against])


def _front_matter(entries: tuple[Entry, ...], kinds: list[str]) -> str:
    """The hub's own keys; values are JSON, which is YAML too."""
    bases = list(dict.fromkeys(entry.base for entry in entries if entry.base))
    licenses = {entry.license for entry in entries}
    lines = [f"base_model: {json.dumps(bases)}", "base_model_relation: quantized"] if bases else []
    if len(licenses) == 1 and entries[0].license:
        lines.append(f"license: {json.dumps(entries[0].license)}")
    lines.append(f"library_name: {LIBRARIES.get(kinds[0], kinds[0])}")
    tags = dict.fromkeys(["dsconvert", *(kind.lower() for kind in kinds), *(e.quant for e in entries)])
    lines.append(f"tags: {json.dumps(list(tags))}")
    return "\n".join(["---", *lines, "---"])


def _origin(entry: Entry) -> str:
    """Where a model comes from and who made this of it, in a sentence."""
    named = f"[{entry.base}]({HUB}/{entry.base})" if entry.base else f"`{_cell(entry.model)}`"
    at = f" at commit `{entry.commit}`" if entry.commit else ""
    version = entry.provenance.get("versions", "dsconvert").partition(",")[0]
    return f"Made of {named}{at} by {_cell(version)}, and proven against it."


def _measured(entry: Entry) -> tuple[str, ...]:
    found = entry.figures
    figures = ("-",) * 5
    if found is not None:
        figures = (
            f"{found['ppl']['value']:.4f}",
            f"{found['ppl_ratio']['value']:.4f}",
            f"{found['kld']['value']:.5f}",
            f"{found['kld_percentiles']['99']:.5f}",
            f"{found['same_top']['value']:.2%}",
        )
    passed = sum(passed for _, passed, _ in entry.checks)
    checks = f"{passed} of {len(entry.checks)} passed" if entry.passed else "**FAILED**"
    return (entry.name, f"{entry.nbytes / 1e6:,.1f}", f"{entry.bits:.2f}", *figures, checks)


def _how(entry: Entry) -> str:
    """On what the figures of the table were taken."""
    text, arithmetic = entry.provenance.get("text", ""), entry.provenance.get("arithmetic", "")
    if entry.figures is None:
        return f"{_cell(entry.name)} was not run whole: its tensors and blocks were compared, see the checks."
    base = entry.figures["ppl_base"]["value"]
    return (
        f"PPL of the original: {base:.4f}. KLD is the KL divergence of the predictions from the original's, "
        f"in nats. Text: {_cell(text)}. Arithmetic: {_cell(arithmetic)}."
    )


def _check(check: tuple[str, bool, str]) -> tuple[str, str, str]:
    name, passed, detail = check
    return ("ok" if passed else "**FAIL**", name, detail)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text that a file may have given, as it can stand in a line of Markdown."""
    return re.sub(r"([|<>\[\]\\])", r"\\\1", " ".join(text.split())) if not text.startswith("`") else text


def _line(command: str) -> str:
    return " ".join(command.split("\n"))


def _facts(entries: tuple[Entry, ...]) -> str:
    """The entries as JSON in which no comment ends."""
    text = json.dumps({"outputs": [asdict(entry) for entry in entries]}, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")
