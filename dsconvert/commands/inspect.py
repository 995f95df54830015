"""`dsconvert inspect`: what a GGUF file or a model folder holds, and whether two files belong together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands.run import command
from dsconvert.events import Fetched

if TYPE_CHECKING:
    from converters.gguf.parse import GGUFFile
    from dsconvert.commands.display import Display

HIDDEN = ("dsconvert.pre_tokenizer.",)  # shown as a table of steps


@command
@click.argument("files", nargs=-1, required=True, type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor.")
def inspect(files: tuple[str, ...], tensors: bool, display: Display) -> int:
    """Show what GGUF files and model folders hold: keys, types, sizes, bits per weight, what made them.

    A folder is a checkpoint, a GPTQ, EXL2, compressed-tensors or MLX folder of any maker, or `sample:`. Of a
    GGUF file the tokenizer's regex spec and the pairing id are shown, too. It may be on the hub, OWNER/NAME
    or OWNER/NAME/FILE, or at a URL: its header is read, and nothing kept. A DeepSeek-VL projector is checked
    for what a runtime needs and does not ask for. Two files are checked for being a pair. Exit code 3:
    something is missing, or the two are not a pair.

    \b
    Example:
      dsconvert inspect sample-q4_k_m.gguf --tensors
      dsconvert inspect owner/name/model-q4_k_m.gguf
    """
    from converters.gguf.inspect import judge, summary
    from converters.outputs import open_output
    from dsconvert import console
    from dsconvert.checkpoints.locate import SAMPLES, locate
    from dsconvert.commands.remote import said
    from dsconvert.proof.folder_summary import folder_summary

    opened: list[GGUFFile] = []
    for name in files:
        fetched = None
        if name in SAMPLES or os.path.isdir(name):
            found = folder_summary(open_output(locate(name) if name in SAMPLES else Path(name)))
        else:
            file, fetched = opened_file(name)
            opened.append(file)
            found = summary(file)
        display.result(found, partial(show, found, tensors))
        if fetched is not None:
            display.result(fetched.as_dict(), partial(console.say, said(fetched)))
    return display.events(judge(opened))


def opened_file(name: str) -> tuple[GGUFFile, Fetched | None]:
    """A GGUF file on this disk, or on the hub or at a URL with what was read of it."""
    from converters.gguf.parse import open_gguf

    if "/" in name and not os.path.lexists(name):
        from converters.gguf.remote import open_remote
        from dsconvert.checkpoints.remote_address import shelf_of

        if (named := shelf_of(name)) is not None:
            shelf, traffic = named[0], named[0].traffic
            file = open_remote(*named)
            return file, Fetched(shelf.place, traffic.nbytes, traffic.answers, traffic.again)
    return open_gguf(Path(name)), None


def show(found: Mapping[str, Any], every_tensor: bool) -> None:
    """What a file or a folder holds, as people read it; on request every tensor."""
    from dsconvert import console

    kind = f"GGUF version {found['version']}" if "version" in found else f"{found['kind']}, {found['quant']}"
    console.say(", ".join(found["files"]))
    console.say(
        f"  {kind}, {console.size(found['bytes'])}, {found['weights']:,} weights, "
        f"{found['bits_per_weight']} bits per weight"
    )
    if "version" in found:
        console.say(f"  pairing id {found['pairing_id'] or 'none'}")
    for note in (found.get("tokenizer"), *found.get("notes", ())):
        if note:
            console.say(f"  {note}")
    console.say()
    console.show_mapping({key: value for key, value in found["keys"].items() if not key.startswith(HIDDEN)})
    console.say()
    rows = (
        (name, t["tensors"], f"{t['weights']:,}", f"{t['bytes']:,}", f"{_bits(t):.2f}")
        for name, t in found["types"].items()
    )
    console.table(rows, ("type", "tensors", "weights", "bytes", "bits"), frozenset({1, 2, 3, 4}))
    if spec := found.get("pre_tokenizer"):
        console.say()
        console.show_steps(spec, spec["runtime"])
    if every_tensor:
        console.say()
        rows = (
            (
                t["name"],
                "x".join(map(str, t["shape"])),
                t["type"],
                f"{t['bytes']:,}",
                f"{t['bits_per_weight']:.2f}",
            )
            for t in found["tensors"]
        )
        console.table(rows, ("tensor", "shape", "type", "bytes", "bits"), frozenset({3, 4}))


def _bits(size: Mapping[str, int]) -> float:
    return 8 * size["bytes"] / size["weights"] if size["weights"] else 0.0
