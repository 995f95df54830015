"""The options of `verify` and `compare`: what outputs are compared on, where, and how strictly."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

from dsconvert.commands.numbers import Number
from dsconvert.commands.shared_options import HUB_OPTIONS, apply, bos_option, device_option, proof_effort
from dsconvert.texts.defaults import STRIDE, WINDOWS

Command = TypeVar("Command", bound=Callable[..., Any])


def proof_options(command: Command) -> Callable[..., Any]:
    """Add the options to a command, which receives a ProofOptions as `options`, and `against` a ModelPath."""

    @wraps(command)
    def with_options(
        *,
        against: str,
        revision: str | None,
        cache_dir: Path | None,
        remote: bool,
        text: str,
        windows: int,
        length: int,
        stride: int,
        device: str,
        dtype: str | None,
        max_kld: float | None,
        max_ppl_ratio: float | None,
        min_top1: float | None,
        engine: str | None,
        effort: str,
        **others: Any,
    ) -> Any:
        from dsconvert.checkpoints.locate import ModelPath
        from dsconvert.proof.options import ProofOptions

        options = ProofOptions(
            text=text, windows=windows, length=length, stride=stride, device=device, dtype=dtype,
            max_kld=max_kld, max_ppl_ratio=max_ppl_ratio, min_top1=min_top1, engine=engine, effort=effort,
        )  # fmt: skip
        model = ModelPath(against, revision, cache_dir, remote)
        return command(against=model, options=options, **others)

    return apply(with_options, PROOF_OPTIONS)


PROOF_OPTIONS = (
    click.option(
        "--against",
        required=True,
        metavar="MODEL_PATH",
        help="The 16-bit checkpoint: a folder, a hub id, sample:.",
    ),
    *HUB_OPTIONS,
    proof_effort,
    click.option(
        "--text",
        default="builtin",
        show_default=True,
        metavar="builtin|wikitext2|c4|FILE",
        help="Evaluation text.",
    ),
    click.option(
        "--windows",
        type=click.IntRange(1),
        default=WINDOWS,
        show_default=True,
        help="Most windows of text.",
    ),
    click.option(
        "--length",
        type=click.IntRange(0),
        default=0,
        help="Tokens in a window.  [default: 512, as llama.cpp takes]",
    ),
    click.option(
        "--stride",
        type=click.IntRange(1),
        default=STRIDE,
        show_default=True,
        help="Tokens from one window to the next; each is scored on what the one before did not see.",
    ),
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16", "float16"]),
        help="Arithmetic.  [default: float32 on a CPU, bfloat16 on CUDA]",
    ),
    click.option(
        "--max-kld", type=Number(0), metavar="NATS", help="Largest mean KL divergence.  [default: by type]"
    ),
    click.option(
        "--max-ppl-ratio",
        type=Number(0),
        metavar="RATIO",
        help="Largest PPL(Q)/PPL(base).  [default: by type]",
    ),
    click.option(
        "--min-top1",
        type=Number(0, 1),
        metavar="SHARE",
        help="Least share of equal top tokens.  [default: none]",
    ),
    click.option(
        "--engine",
        type=click.Choice(["llama.cpp"]),
        help="Also run the file in this runtime: token ids, logits, perplexity (needs xllamacpp).",
    ),
    click.option(
        "--report",
        type=click.Path(path_type=Path),
        metavar="FILE.html",
        help="The report as a page. Replaces an earlier report, no other file.",
    ),
    bos_option,
)
