"""`dsconvert chat`: a conversation with an output, in a terminal or one question at a time."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dsconvert.commands import shared_options as shared
from dsconvert.commands.numbers import Number
from dsconvert.commands.run import command
from dsconvert.errors import UsageError

if TYPE_CHECKING:
    from dsconvert.chat.session import Session
    from dsconvert.commands.chat_model import Opened
    from dsconvert.commands.display import Display

LONGEST = 1 << 20  # bytes of a question on standard input; no context holds more


@command
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    metavar="TEXT",
    help="Answer this, and leave.  [default: standard input, unless a terminal]",
)
@click.option("--system", default="", metavar="TEXT", help="What the model is told before the conversation.")
@click.option(
    "--image",
    "images",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="PICTURE",
    help="A picture before the first message; may be repeated.",
)
@click.option(
    "--temperature",
    type=Number(0, 100),
    default=0.7,
    show_default=True,
    help="How freely tokens are drawn; 0 takes the likeliest.",
)
@click.option(
    "--top-k",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="Draw from so many likeliest tokens; 0: from all.",
)
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=0.95,
    show_default=True,
    help="Draw from the likeliest tokens up to this sum of their probabilities.",
)
@shared.seed_option
@click.option(
    "--max-tokens",
    type=click.IntRange(1),
    help="End an answer after so many tokens.  [default: where the model does; 256 without a chat template]",
)
@click.option(
    "--context",
    type=click.IntRange(16, 1 << 24),
    help="Tokens that the conversation may have.  [default: what the model was trained on, 4096 at most]",
)
@shared.mmproj_option
@shared.device_option
@shared.threads_option
def chat(
    file: Path,
    prompt: str | None,
    system: str,
    images: tuple[Path, ...],
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    max_tokens: int | None,
    context: int | None,
    mmproj: Path | None,
    device: str,
    threads: int | None,
    display: Display,
) -> int:
    """Talk to a GGUF file in llama.cpp, or to a folder, quantized or not, in torch.

    With --prompt, or where standard input is no terminal, one answer goes to standard output and everything
    else to standard error. The prompt is written in the model's own chat template, and an answer ends at the
    model's own stop tokens. Exit code 0, or 2: stopped by an error.

    \b
    Example:
      dsconvert chat sample-q4_k_m.gguf --prompt "Return the list" --max-tokens 40
    """
    from dsconvert import console
    from dsconvert.chat.sampling import Sampling
    from dsconvert.chat.session import Session
    from dsconvert.commands.chat_model import Request, open_model

    check_file(file)
    asked = question(prompt)
    if asked is None and display.json:
        raise UsageError(
            "--json writes to standard output, where the conversation is",
            hint="Name a file, --json FILE.jsonl, or ask one question with --prompt",
        )
    check_pictures(images)
    with open_model(Request(file, mmproj, context, threads, device)) as opened:
        for note in opened.notes + no_template(opened):
            console.note(f"warning: {note}")
        session = Session(
            opened.model, Sampling(temperature, top_k, top_p), system=system, limit=max_tokens, seed=seed
        )
        if asked is None:
            from dsconvert.commands.chat_terminal import talk

            talk(session, display, opened.title, images)
        else:
            answer_once(session, display, asked, images)
    return console.PASSED


def question(prompt: str | None) -> str | None:
    """What is asked once: the prompt, or standard input; None where that is a terminal. Raises UsageError."""
    if prompt is None and sys.stdin is not None:
        if sys.stdin.isatty():
            return None
        data = sys.stdin.buffer.read(LONGEST + 1)
        if len(data) > LONGEST:
            raise UsageError(f"standard input has over {LONGEST:,} bytes, more than any context holds")
        try:
            prompt = data.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UsageError("standard input is not UTF-8", why=str(error)[:100]) from None
    if prompt is None or not prompt.strip():
        raise UsageError("there is no question", hint="Give --prompt TEXT, or a text on standard input")
    return prompt


def check_file(file: Path) -> None:
    """See that there is something to talk to before a question is read; raises UsageError."""
    from dsconvert.checkpoints.locate import SAMPLES

    if str(file) not in SAMPLES and not os.path.lexists(file):
        raise UsageError(
            "there is no such file or folder", where=file, hint="Give a GGUF file or a model folder"
        )


def check_pictures(paths: tuple[Path, ...]) -> None:
    """See that pictures are files before a model is loaded; raises UsageError."""
    for path in paths:
        if not path.is_file():
            raise UsageError("there is no such file", where=path, hint="Give --image a PNG or JPEG file")


def no_template(opened: Opened) -> tuple[str, ...]:
    """A word on a model without a chat template."""
    if opened.model.text.template:
        return ()
    return ("the model has no chat template: it is no chat model, and continues the text that it is given",)


def answer_once(session: Session, display: Display, asked: str, images: tuple[Path, ...]) -> None:
    """One answer on standard output, as text while it comes or as JSON."""
    from dsconvert.chat.session import never
    from dsconvert.commands.chat_terminal import show_notes, stream

    said = stream(session, asked, images, never, shown=not display.json)
    show_notes(said, display)
    display.result(said.as_dict(), lambda: None)
