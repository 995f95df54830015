"""`dsconvert gguf`: a checkpoint to GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsconvert.commands.calibration_options import bos_option, calibration_options, wanted_of
from dsconvert.commands.given import refuse
from dsconvert.commands.numbers import size
from dsconvert.commands.run import run


def _quants(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    from converters.gguf.file_types import FILE_TYPES
    from converters.gguf.mixtures import canonical

    names = tuple(canonical(name.strip()) for name in value.split(",") if name.strip())
    unknown = [name for name in names if name not in FILE_TYPES]
    if unknown or not names:
        raise click.BadParameter(
            f"{', '.join(unknown) or 'nothing'} is unknown; known: {', '.join(FILE_TYPES)}"
        )
    return names


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


@click.command()
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
@click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance matrix (dsconvert imatrix, llama-imatrix): quantize what counts more exactly.",
)
@calibration_options(None, 512)
@bos_option
@click.option("--pre", metavar="NAME", help="The runtime's pre-tokenizer, when none is proven to fit.")
@click.option(
    "--split-max-size",
    callback=size,
    metavar="SIZE",
    help="Split into files of at most this size (4G, 500M).",
)
@click.option(
    "--mmproj", type=click.Path(path_type=Path), help="Projector file of a model with a vision tower."
)
@click.option("--no-mmproj", is_flag=True, help="Convert the language model alone.")
@click.option(
    "--mmproj-quant",
    type=click.Choice(["f16", "bf16", "f32", "q8_0"]),
    default="f16",
    show_default=True,
    help="Type of the projector's matrices.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Of --calib and --verify full: auto, cpu, cuda, cuda:N.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="Worker threads; default one per core.")
@click.option(
    "--verify",
    type=click.Choice(["off", "quick", "full"]),
    default="quick",
    show_default=True,
    help="How much of the result is proven against the checkpoint.",
)
@click.option("--force", is_flag=True, help="Replace an existing output, never a file that is read.")
@click.option(
    "--allow-nonfinite", is_flag=True, help="Convert weights that hold NaN or infinity all the same."
)
@click.option("--dry-run", is_flag=True, help="Show every tensor, type and exact size; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for everything that happens.")
@click.option("--quiet", is_flag=True, help="Only warnings and failures.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def gguf(model_path: str, as_json: bool, quiet: bool, debug: bool, threads: int | None, **asked: Any) -> None:
    """Convert a checkpoint to GGUF for llama.cpp, in one pass, and prove the result.

    MODEL_PATH is a Hugging Face folder, a .safetensors file, a hub id, or an embedded sample: `sample:`, or
    `sample-vl:` with a vision tower; default: the current folder. Exit code 0: converted and proven,
    2: stopped, 3: a check failed.
    """  # fmt: skip

    def work() -> int:
        from converters.gguf.convert import convert
        from converters.gguf.output import Options
        from dsconvert import console

        wanted = wanted_of(asked)
        if asked["no_mmproj"]:
            refuse("mmproj_quant", where="with --no-mmproj", hint="Leave one of them out")
        if wanted is None and asked["verify"] != "full":
            refuse(
                "device", where="without --calib and --verify full", hint="A plain conversion uses the CPU"
            )
        options = Options(model=model_path, threads=threads or 0, calibration=wanted, **asked)
        return console.render(convert(options), as_json=as_json, quiet=quiet, plan=options.dry_run)

    run(work, as_json=as_json, debug=debug)
