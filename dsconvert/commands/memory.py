"""`dsconvert memory`: the peak memory of a model by type, batch and length, and what fits a card."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.given import refuse
from dsconvert.commands.numbers import counts, names
from dsconvert.commands.numbers import memory as memory_size
from dsconvert.commands.run import command

if TYPE_CHECKING:
    from dsconvert.commands.display import Display
    from dsconvert.memory.model import Sized
    from dsconvert.memory.table import Question, Row


@command
@shared.model_argument
@click.option(
    "--batch",
    "batches",
    default="1",
    show_default=True,
    callback=counts,
    metavar="N,...",
    help="Sequences at once.",
)
@click.option(
    "--seq",
    "lengths",
    default="256,512,1024,2048,4096",
    show_default=True,
    callback=counts,
    metavar="N,...",
    help="Tokens of each sequence.",
)
@click.option(
    "--gpus",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="Cards that share the model, whole blocks each; figures are of the fullest.",
)
@click.option(
    "--vram",
    callback=memory_size,
    metavar="SIZE",
    help="What a card has (24GB): says what fits, how long, and names the best.",
)
@click.option(
    "--cache", metavar="TYPE", help="Type of the key-value cache (f16, q8_0, ...).  [default: 16 bits]"
)
@click.option(
    "--types", callback=names, metavar="NAME,...", help="Only these types (bf16, q4_k_m, gptq 4, ...)."
)
@click.option(
    "--runtime",
    "runtimes",
    callback=names,
    metavar="NAME,...",
    help="Only these runtimes: eager, transformers, exllamav2, llama.cpp, llama.cpp-cpu, vllm, mlx.",
)
@click.option(
    "--measure", is_flag=True, help="Run it, too: a GGUF file in llama.cpp, a 16-bit folder in torch."
)
@shared.device_option
def memory(
    model_path: str,
    batches: tuple[int, ...],
    lengths: tuple[int, ...],
    gpus: int,
    vram: int | None,
    cache: str | None,
    types: tuple[str, ...],
    runtimes: tuple[str, ...],
    measure: bool,
    device: str,
    display: Display,
) -> int:
    """Show how much memory a model takes when it runs, by type, batch and length, and what fits a card.

    MODEL_PATH is a config.json, a folder with or without weights, a GGUF file, an output folder, a hub id, or
    `sample:`; default: the current folder. No weight is read. GiB of the fullest card: weights, cache,
    activations and the runtime's own (docs/memory.md has the formula).

    \b
    Example:
      dsconvert memory sample: --vram 24GB --types bf16,q4_k_m
    """
    from converters.sizes import sizes_of
    from dsconvert.memory.table import Question, as_dict, rows

    if not measure:
        refuse("device", where="without --measure", hint="Computed figures are of no device")
    sized = sizes_of(model_path, fetched=measure)
    if measure and not runtimes:
        runtimes = ("llama.cpp-cpu",) if sized.path.suffix == ".gguf" else ("transformers", "eager")
    asked = Question(batches, lengths, gpus, cache.lower() if cache else None, types, runtimes, vram)
    found = list(rows(sized, asked))
    measured = run_each(sized, asked, found, device, display) if measure else []
    display.result(as_dict(sized, asked, found, measured), partial(show, sized, asked, found, measured))
    return 0


def run_each(
    sized: Sized, asked: Question, found: Sequence[Row], device: str, display: Display
) -> list[dict[str, Any]]:
    """Every cell of the table run, one after the other."""
    from dsconvert.memory.measure import measurable, measure

    cells: list[dict[str, Any]] = []
    for row in found:
        for length, peak in zip(asked.lengths, row.peaks, strict=True):
            wanted = measurable(sized, row.made, row.runtime.name, row.batch, length, asked, device)
            display.text(f"running batch {row.batch}, length {length} in {row.runtime.name}")
            cells.append(
                {"type": row.made.type, "runtime": row.runtime.name, "batch": row.batch, "length": length,
                 "computed": peak.total, **measure(wanted)}
            )  # fmt: skip
    return cells


def show(sized: Sized, asked: Question, found: Sequence[Row], measured: Sequence[dict[str, Any]]) -> None:
    """The table as people read it: GiB, and in its place OOM where a card has less."""
    from dsconvert import console
    from dsconvert.memory.table import best

    where = f"the fullest of {asked.cards} cards" if asked.cards > 1 else "one card"
    console.say(f"{sized.name}: {sized.parameters:,} weights; GiB on {where}")
    heads = ["type", "runtime", "bits", "weights", "batch", *map(str, asked.lengths)]
    heads += ["longest"] if asked.vram is not None else []
    console.table((_cells(sized, asked, row) for row in found), heads, frozenset(range(2, len(heads))))
    bare = ", ".join(dict.fromkeys(row.runtime.name for row in found if row.runtime.bare))
    if bare:
        console.say(f"in {bare}: weights and cache alone, nothing else was measured")
    if measured:
        console.say()
        console.table(
            (
                (one["runtime"], one["batch"], one["length"], _gib(one["computed"]), _gib(one["bytes"]),
                 _gib(one["process"]) if "process" in one else "")
                for one in measured
            ),
            ("measured in", "batch", "length", "computed", "measured", "process"),
            frozenset(range(1, 6)),
        )  # fmt: skip
    if asked.vram is not None:
        console.say()
        for line in _advice(asked, best(sized, asked, found)):
            console.say(line)


def _cells(sized: Sized, asked: Question, row: Row) -> list[str]:
    weights = row.made.weights.total
    cells = [
        row.made.type,
        row.runtime.name,
        f"{8 * weights / sized.parameters:.2f}",
        _gib(weights),
        str(row.batch),
    ]
    fits = [asked.vram is None or one.total <= asked.vram for one in row.peaks]
    cells += [_gib(one.total) if fit else "OOM" for one, fit in zip(row.peaks, fits, strict=True)]
    return cells + ([str(row.longest or "none")] if asked.vram is not None else [])


def _gib(nbytes: int) -> str:
    gib = nbytes / (1 << 30)
    return f"{gib:.2f}" if gib >= 1 else f"{gib:.3f}"


def _advice(asked: Question, row: Row | None) -> list[str]:
    size = _gib(asked.vram or 0)
    if row is None:
        return [f"nothing fits {size} GiB: take more cards (--gpus) or a smaller model"]
    place = f"{row.made.type} in {row.runtime.name}, up to {row.longest} tokens at batch {row.batch}"
    return [
        f"best for {size} GiB: {place}",
        f"    {row.made.command or 'it is there already: nothing to convert'}",
    ]
