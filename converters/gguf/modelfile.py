"""The Modelfile that tells Ollama how to run a GGUF file: its template in Go's form, its stop tokens.

Ollama runs no jinja. For a file without a TEMPLATE it takes one of some twenty templates of its own where the
file's jinja is nearly the same text, and else hands a message on as it is. Source: ollama's
docs/modelfile.mdx, template/template.go and server/create.go.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import dsconvert
from dsconvert.checkpoints.output_files import write_file
from dsconvert.checkpoints.output_plan import check_distinct, check_side_file
from dsconvert.errors import ConversionError
from dsconvert.events import Event, Step, Warn
from dsconvert.reading import read_text
from tokenizer_tools.library import read_object
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.turns import ASSISTANT, SYSTEM, USER, Turns, find_turns

if TYPE_CHECKING:
    from converters.gguf.output import Output
    from converters.gguf.plan import Job

MARK = "# Written by dsconvert "
KIND = "a Modelfile as dsconvert wrote it"
LIMIT = 1 << 20  # bytes; one of ours has some thousand
SAMPLING = ("temperature", "top_p", "top_k")
NO_TEMPLATE = (
    "the chat template cannot be written for Ollama, whose templates are another language: what it writes "
    "around a message hangs on more than the message's role. The Modelfile has the stop tokens only"
)
NO_CHAT = "the model has no chat template: Ollama hands it the text as it is"


def modelfile_of(job: Job, output: Output) -> Path:
    """Where the Modelfile of an output goes: beside it, with the type in its name where there are several."""
    several = len(job.outputs) > 1
    return output.folder / (f"Modelfile-{output.quant}" if several else "Modelfile")


def check_modelfiles(job: Job) -> None:
    """See that the Modelfiles can be written: what exists is replaced only if it is ours; OutputError."""
    paths = [modelfile_of(job, output) for output in job.outputs]
    check_distinct([*paths, *job.paths])
    for path in paths:
        check_side_file(path, ours=is_ours, kind=KIND, inputs=job.inputs)


def write_modelfiles(job: Job) -> Iterator[Event]:
    """Write the Modelfile of each output; yields where they are and what the user should know."""
    tokenizer = job.tokenizer
    turns = turns_of(tokenizer)
    if turns is None:
        yield Warn(NO_TEMPLATE if tokenizer.chat.default else NO_CHAT)
    for output in job.outputs:
        path = modelfile_of(job, output)
        files = [*output.paths, *(job.projector.paths if job.projector is not None else ())]
        lines = [*(f"FROM ./{file.name}" for file in files), *template_lines(turns)]
        lines += [*stop_lines(tokenizer), *sampling_lines(job.checkpoint.folder)]
        check_side_file(path, ours=is_ours, kind=KIND)
        write_file(path, signed("\n".join(lines) + "\n").encode("utf-8", "replace"), replace=True)
        yield Step(f"wrote {path}: ollama create NAME -f {path}")


def turns_of(tokenizer: TokenizerData) -> Turns | None:
    """The pieces of the default template, without BOS where Ollama, as llama.cpp, puts it before a prompt."""
    names = {name: tokenizer.tokens[i] for name, i in tokenizer.special.items()}
    bos = names.get("bos", "")
    if not tokenizer.chat.default:
        return None
    turns = find_turns(tokenizer.chat.default, bos, names.get("eos", ""))
    if turns is None or not (bos and tokenizer.add_bos):
        return turns
    before, after = dict(turns.before), dict(turns.after)
    if not turns.head and before[USER].startswith(bos):  # of every question: the first one's goes
        before[USER] = before[USER].removeprefix(bos)
        after = {role: end if role == USER else end + bos for role, end in after.items()}
    if SYSTEM in before:
        before[SYSTEM] = before[SYSTEM].removeprefix(bos)
    return Turns(turns.head.removeprefix(bos), before, after, turns.ask)


def template_lines(turns: Turns | None) -> list[str]:
    """A TEMPLATE that writes the messages as the pieces say; text stands in Go's quotes, so that no white
    space of the template itself gets into a prompt."""
    if turns is None:
        return []
    roles = [role for role in (SYSTEM, USER, ASSISTANT) if role in turns.before]
    lines = ["{{- range $i, $_ := .Messages }}", "{{- $last := eq (len (slice $.Messages $i)) 1 }}"]
    if turns.head:
        lines.append(f'{{{{- if and (eq $i 0) (ne .Role "system") }}}}{text(turns.head)}{{{{ end }}}}')
    for at, role in enumerate(roles):
        after = text(turns.after[role])
        if role == ASSISTANT and after:
            after = f"{{{{ if not $last }}}}{after}{{{{ end }}}}"
        branch = "else if" if at else "if"
        lines.append(
            f'{{{{- {branch} eq .Role "{role}" }}}}{text(turns.before[role])}{{{{ .Content }}}}{after}'
        )
    lines.append("{{- end }}")
    if turns.ask:
        lines.append(f'{{{{- if and $last (ne .Role "assistant") }}}}{text(turns.ask)}{{{{ end }}}}')
    lines.append("{{- end }}")
    return ['TEMPLATE """' + "\n".join(lines) + '"""']


def text(piece: str) -> str:
    """A text as an action of Go's template language; nothing for none."""
    return f"{{{{ {go_string(piece)} }}}}" if piece else ""


def go_string(piece: str) -> str:
    """A text as an interpreted string of Go, with everything that is no visible character escaped."""
    quoted = json.dumps(piece, ensure_ascii=False)  # its escapes are Go's, too
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def stop_lines(tokenizer: TokenizerData) -> list[str]:
    """A PARAMETER for every token that ends a generation, also for those that no GGUF key can carry."""
    stops = [tokenizer.tokens[i] for i in tokenizer.stops]
    return [f'PARAMETER stop "{stop}"' for stop in stops if stop.isprintable() and '"' not in stop]


def sampling_lines(folder: Path) -> list[str]:
    """How the model's authors draw its tokens, where generation_config.json says."""
    config = read_object(folder / "generation_config.json")
    if config.get("do_sample") is not True:
        return []
    found = {key: config.get(key) for key in SAMPLING}
    return [
        f"PARAMETER {key} {value}"
        for key, value in found.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and value > 0
    ]


def signed(body: str) -> str:
    """A Modelfile with a first line that says who wrote it and the digest of the rest."""
    digest = hashlib.sha256(body.encode("utf-8", "replace")).hexdigest()[:16]
    return f"{MARK}{dsconvert.__version__} ({digest}): ollama create NAME -f Modelfile\n{body}"


def is_ours(path: Path) -> bool:
    """Whether a file is a Modelfile as it was written here; one that was changed since is its user's."""
    try:
        found = read_text(path, LIMIT)
    except ConversionError:
        return False
    first, _, body = found.partition("\n")
    return first.startswith(MARK) and signed(body).split("(")[1][:16] in first
