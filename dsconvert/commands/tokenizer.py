"""`dsconvert tokenizer`: show, encode, compare."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from dsconvert.commands.given import refuse
from dsconvert.commands.run import run


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--encode", "texts", multiple=True, metavar="TEXT", help="Show the ids of a text; may be repeated."
)
@click.option(
    "--compare",
    "other",
    type=click.Path(path_type=Path),
    help="Another tokenizer that should give the same ids.",
)
@click.option(
    "--text", "text_file", type=click.Path(path_type=Path), help="Compare on the lines of this file besides."
)
@click.option(
    "--strings",
    type=click.IntRange(0),
    default=20000,
    show_default=True,
    help="Random strings over all of Unicode to compare on.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random strings.")
@click.option("--json", "as_json", is_flag=True, help="The result as one JSON object.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def tokenizer(file: Path, other: Path | None, as_json: bool, debug: bool, **asked: Any) -> None:
    """Show the tokenizer of a GGUF file or a model folder: kind, regex steps; encode; compare.

    With --compare the exit code is 3 when any text gives other ids; the differences are shown by class.
    """  # fmt: skip

    def work() -> int:
        from dsconvert import console

        if other is None:
            refuse("text_file", "strings", "seed", where="without --compare", hint="Give --compare OTHER")
        opened = _open_tokenizer(file)
        found: dict[str, Any] = {"file": str(file), "kind": opened.kind, "runtime": opened.runtime}
        if opened.spec:
            steps = [vars(step) for step in opened.spec.steps]
            found["pre_tokenizer"] = {"sha256": opened.spec.sha256, "flavor": "oniguruma", "steps": steps}
        found["encoded"] = [_encoded(opened.tokenizer, text, file) for text in asked["texts"]]
        if other is not None:
            found["comparison"] = _compared(opened.tokenizer, _open_tokenizer(other).tokenizer, **asked)
        (console.say_json if as_json else console.show_tokenizer)(found)
        return console.FAILED if found.get("comparison", {}).get("different") else console.PASSED

    run(work, as_json=as_json, debug=debug)


def _open_tokenizer(path: Path) -> Any:
    from dsconvert.checkpoints.locate import SAMPLES, in_folder, locate
    from tokenizer_tools.show import open_folder, open_metadata

    if path.suffix != ".gguf":
        if str(path) in SAMPLES:
            return open_folder(locate(str(path)))
        bare = os.path.isdir(path) and not os.path.exists(path / "tokenizer.json")
        return open_folder(in_folder(path).path if bare else path)
    from converters.gguf.parse import open_gguf

    return open_metadata(path, open_gguf(path).keys)


def _encoded(tokenizer: Any, text: str, path: Path) -> dict[str, Any]:
    from dsconvert.errors import UsageError
    from tokenizer_tools.library import tokens

    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError("--encode needs text in UTF-8", where=text)
    ids, found = tokens(tokenizer, text, path)
    return {"text": text, "ids": ids, "tokens": found}


def _compared(
    first: Any, second: Any, text_file: Path | None, strings: int, seed: int, **rest: Any
) -> dict[str, Any]:
    from dataclasses import asdict
    from itertools import chain

    from tokenizer_tools import parity
    from tokenizer_tools.library import read_text

    lines = read_text(text_file).splitlines() if text_file else []
    texts = chain(parity.PROBES, lines, parity.random_texts(seed, strings))
    return asdict(parity.compare_ids(parity.encoder(first), parity.encoder(second), texts))
