"""How a checkpoint spells its tensors' names: what wrappers put around them, and what nobody reads.

Trainers save a model inside of others (peft, torch.compile, DDP, FSDP, Lightning), from its inner class, or
with buffers and heads that no forward pass of the language model uses. The tables know one spelling.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.errors import CheckpointError, quoted
from dsconvert.models.architecture import Architecture
from dsconvert.models.architectures import ARCHITECTURES
from dsconvert.models.tensor_table import DROP, Row

# Parts of a name that a wrapper puts anywhere into it: torch.compile, FSDP, checkpointing, DeepSpeed, DDP.
WRAPPERS = frozenset(
    ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
)
INNER = "model."  # what the class inside of the one with a head leaves out
LEFTOVERS = re.compile("|".join(f"(?:{pattern})" for pattern in DROP))
TIED = re.compile(r"(.+\.)?(lm_head|embed_tokens)\.weight")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def may_be_absent(name: str) -> bool:
    """Whether index and shards may disagree on a tensor: one that nobody reads, or one of a tied pair."""
    return bool(LEFTOVERS.fullmatch(name) or TIED.fullmatch(name))


def respelled(
    tensors: Mapping[str, Stored], architecture: str, tied: bool, where: object
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The tensors by the names of the class's table, and notes on what was changed.

    Leftovers are taken out. With `tied` the one of embedding and head that is there is the embedding.
    An unknown class leaves all as it is. Raises CheckpointError where two tensors come to one name.
    """
    known = ARCHITECTURES.get(architecture)
    if known is None:
        return dict(tensors), ()
    unused = [name for name in tensors if LEFTOVERS.fullmatch(name)]
    kept = [name for name in tensors if name not in set(unused)]
    names, notes = _mapped(kept, known, where)
    found = {new: tensors[old] for old, new in names.items()}
    if unused:
        notes.append(f"left out, since the language model reads none of them: {_listed(unused)}")
    if tied:
        notes += _tie(found, known)
    return found, tuple(notes)


def _mapped(names: list[str], architecture: Architecture, where: object) -> tuple[dict[str, str], list[str]]:
    """The table's spelling of each name, and notes; names that no row fits keep their own ending."""
    known = {row.hf for rows in (architecture.table.rows, *architecture.beside) for row in rows}
    heads = {row.hf for row in architecture.table.rows if row.role == "head"}
    if all(_is_row(name, known) for name in names):
        return {name: name for name in names}, []
    bare = {name: ".".join(p for p in name.split(".") if p not in WRAPPERS) for name in names}
    ends = {name: found for name, text in bare.items() if (found := _end(text, known))}
    around = Counter(text[: -len(end)] for text, end, row in _rows(bare, ends) if row not in heads)
    prefix = around.most_common(1)[0][0] if around else ""
    # Of a model saved from its inner class, what begins as its rows do belongs to it too.
    inner = {end.split(".")[0] for text, end, row in _rows(bare, ends) if row != end}
    mapped = {}
    for name, text in bare.items():
        end, row = ends.get(name, ("", ""))
        own = text.removeprefix(prefix)
        fits = row and (text == prefix + end or (row in heads and prefix.startswith(text[: -len(end)])))
        mapped[name] = row if fits else INNER + own if own.split(".")[0] in inner else own
    _refuse_clashes(mapped, where)
    changed = [name for name, new in mapped.items() if name != new]
    if not changed:
        return mapped, []
    example = f"{quoted(changed[0])} is read as {quoted(mapped[changed[0]])}"
    more = f", and {len(changed) - 1} more alike" if len(changed) > 1 else ""
    return mapped, [f"the tensors' names are those of a wrapper or an inner class: {example}{more}"]


def _rows(bare: Mapping[str, str], ends: Mapping[str, tuple[str, str]]) -> Iterable[tuple[str, str, str]]:
    return ((bare[name], end, row) for name, (end, row) in ends.items())


def _end(text: str, known: set[str]) -> tuple[str, str] | None:
    """The longest ending of a name that is a row's, with or without INNER, and the row's own name."""
    parts = text.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        for row in (end, INNER + end):
            if _is_row(row, known):
                return end, row
    return None


def _is_row(name: str, known: set[str]) -> bool:
    layered = NUMBER.sub("{i}", name, count=1)
    return name in known or layered in known or NUMBER.sub("{e}", layered, count=1) in known


def _refuse_clashes(mapped: Mapping[str, str], where: object) -> None:
    first: dict[str, str] = {}
    for old, new in mapped.items():
        if new in first:
            raise CheckpointError(
                "holds one tensor under two names",
                where=where,
                why=f"{quoted(first[new])} and {quoted(old)} both stand for {quoted(new)}",
                hint="Keep the tensors of one model",
            )
        first[new] = old


def _tie(tensors: dict[str, Stored], architecture: Architecture) -> list[str]:
    """Make the one that is there the embedding, as transformers' tie_weights does; returns notes.

    A head beside the embedding counts, also as transformers has it, unless both are the same bytes of the
    file, as they are in every pytorch_model.bin of a tied model.
    """
    row: Row = next(row for row in architecture.table.rows if row.tied_to)
    head, embedding = tensors.get(row.hf), tensors.get(row.tied_to)
    if head is None:
        return []
    if embedding is None:
        tensors[row.tied_to] = tensors.pop(row.hf)
        return [f"{row.tied_to} is not there; {row.hf}, to which config.json ties it, is read for both"]
    if head.offset is not None and (head.path, head.offset) == (embedding.path, embedding.offset):
        del tensors[row.hf]
    return []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(quoted, names[:3])) + more
