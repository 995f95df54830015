"""The command line: the only place that wires the packages together.

Heavy imports stand inside the commands, so that `dsconvert --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert import __version__
from dsconvert.errors import ConversionError

if TYPE_CHECKING:
    from types import FrameType

UNITS = {"K": 1000, "M": 1000**2, "G": 1000**3}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="dsconvert")
def cli() -> None:
    """Convert and quantize DeepSeek and other Llama-layout models, with proof."""


def run(work: Callable[[], int], *, as_json: bool, debug: bool) -> None:
    """Run a command's work and leave with its exit code; errors become one paragraph and exit code 2."""
    from dsconvert import console

    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = work()
    except ConversionError as error:
        if debug:
            raise
        code = console.fail(error, as_json)
    except KeyboardInterrupt:
        code = console.fail(ConversionError("interrupted", why="No unfinished file was left"), as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = console.STOPPED
    except Exception as error:
        if debug:
            raise
        code = console.fail(_unexpected(error), as_json)
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _unexpected(error: Exception) -> ConversionError:
    from dsconvert.config import short

    return ConversionError(
        f"stopped by an unexpected {type(error).__name__}: {short(error)}",
        why="This is a fault of dsconvert",
        hint="Run the same command with --debug and report what it prints",
    )


def _quants(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    from converters.gguf.recipe import FILE_TYPES, canonical

    names = tuple(canonical(name.strip()) for name in value.split(",") if name.strip())
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        raise click.BadParameter(
            f"{', '.join(unknown) or 'nothing'} is unknown; known: {', '.join(FILE_TYPES)}"
        )
    return names


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A number of bytes: 4G, 500M, or plain; decimal units, as llama.cpp's split tool takes them."""
    if value is None:
        return None
    text = value.upper().removesuffix("B")
    scale = UNITS.get(text[-1:], 1)
    number = text[:-1] if scale > 1 else text
    if not number.isdigit() or int(number) == 0:
        raise click.BadParameter(f"{value!r} is no size; write 500M or 4G")
    return int(number) * scale


def _overrides(
    ctx: click.Context, param: click.Parameter, value: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in value:
        pattern, equals, kind = text.rpartition("=")
        if not equals or not pattern:
            raise click.BadParameter(f"{text!r} is not of the form PATTERN=TYPE")
        pairs.append((pattern, kind.lower()))
    return tuple(pairs)


@cli.command()
@click.argument("model_path", required=False, default="")
@click.option(
    "-o", "--outfile", type=click.Path(path_type=Path), help="Output file; default MODEL-QUANT.gguf here."
)
@click.option(
    "-q",
    "--quant",
    "quants",
    default="q4_0",
    show_default=True,
    callback=_quants,
    help="Type or mixture; several, with commas, are made from one read.",
)
@click.option(
    "--tensor-type",
    "overrides",
    multiple=True,
    metavar="PATTERN=TYPE",
    callback=_overrides,
    help="Type for the tensors whose GGUF name the pattern matches; may be repeated.",
)
@click.option("--pure", is_flag=True, help="The same type for every matrix, no mixture.")
@click.option("--pre", metavar="NAME", help="The runtime's pre-tokenizer, when none is proven to fit.")
@click.option(
    "--split-max-size",
    callback=_size,
    metavar="SIZE",
    help="Split into files of at most this size (4G, 500M).",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Worker threads; default one per core.")
@click.option(
    "--verify",
    type=click.Choice(["off", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How much of the result is proven against the checkpoint.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity all the same."
)
@click.option("--dry-run", is_flag=True, help="Show every tensor, type and exact size; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for everything that happens.")
@click.option("--quiet", is_flag=True, help="Only warnings and failures.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def gguf(model_path: str, as_json: bool, quiet: bool, debug: bool, threads: int | None, **asked: Any) -> None:
    """Convert a checkpoint to GGUF for llama.cpp, in one pass, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or `sample:` (the embedded sample);
    default: the current folder. Exit code 0: converted and proven, 2: stopped, 3: a check failed.
    """  # fmt: skip

    def work() -> int:
        from converters.gguf.convert import convert
        from converters.gguf.job import Options
        from dsconvert import console

        options = Options(model=model_path, threads=threads or 0, **asked)
        return console.render(convert(options), as_json=as_json, quiet=quiet, plan=options.dry_run)

    run(work, as_json=as_json, debug=debug)


@cli.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Everything as one JSON object a file.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(files: tuple[Path, ...], tensors: bool, as_json: bool, debug: bool) -> None:
    """Show what GGUF files hold: keys, types, sizes, the tokenizer's regex spec, the pairing id."""

    def work() -> int:
        from converters.gguf.inspect import summary
        from converters.gguf.parse import open_gguf
        from dsconvert import console

        for path in files:
            found = summary(open_gguf(path))
            (console.say_json(found) if as_json else console.show_summary(found, tensors))
        return console.PASSED

    run(work, as_json=as_json, debug=debug)


@cli.command()
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
    """Show the pre-tokenizer of a GGUF file or a model folder as regex steps; encode; compare.

    With --compare the exit code is 3 when any text gives other ids; the differences are shown by class.
    """  # fmt: skip

    def work() -> int:
        from dsconvert import console

        opened = _open_tokenizer(file)
        found: dict[str, Any] = {"file": str(file), "runtime": opened.runtime}
        if opened.spec:
            steps = [vars(step) for step in opened.spec.steps]
            found["pre_tokenizer"] = {"sha256": opened.spec.sha256, "flavor": "oniguruma", "steps": steps}
        found["encoded"] = [_encoded(opened.tokenizer, text) for text in asked["texts"]]
        if other is not None:
            found["comparison"] = _compared(opened.tokenizer, _open_tokenizer(other).tokenizer, **asked)
        (console.say_json if as_json else console.show_tokenizer)(found)
        return console.FAILED if found.get("comparison", {}).get("different") else console.PASSED

    run(work, as_json=as_json, debug=debug)


def _open_tokenizer(path: Path) -> Any:
    from tokenizer_tools.show import open_folder, open_metadata

    if path.suffix != ".gguf":
        return open_folder(path)
    from converters.gguf.parse import open_gguf

    return open_metadata(path, open_gguf(path).keys)


def _encoded(tokenizer: Any, text: str) -> dict[str, Any]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return {"text": text, "ids": encoding.ids, "tokens": encoding.tokens}


def _compared(
    first: Any, second: Any, text_file: Path | None, strings: int, seed: int, **rest: Any
) -> dict[str, Any]:
    from dataclasses import asdict
    from itertools import chain

    from tokenizer_tools import parity
    from tokenizer_tools.library import read_text

    lines = read_text(text_file).splitlines() if text_file else []
    texts = chain(parity.PROBES, lines, parity.random_texts(seed, strings))
    return asdict(parity.compare(parity.encoder(first), parity.encoder(second), texts))


def main() -> None:
    """The console script."""
    cli()


if __name__ == "__main__":
    main()
