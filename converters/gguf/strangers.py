"""What is given in place of a GGUF file that is read here: what it is by its first bytes, and what to do."""

from __future__ import annotations

from pathlib import Path

from converters.gguf.layout import VERSION
from dsconvert.errors import CheckpointError

VERSIONS = (2, VERSION)
AGAIN = "Fetch or convert the file again"
# How other files begin that are taken for GGUF files: the beginning, what the file is, what to do.
OTHERS: tuple[tuple[tuple[bytes, ...], str, str], ...] = (
    (
        (b"version https://git-lfs",),
        "a Git LFS pointer, the file itself was not fetched",
        "Run git lfs pull, or fetch it with huggingface-cli download",
    ),
    (
        (b"<!doctype", b"<!DOCTYPE", b"<html", b"<HTML", b"<?xml"),
        "a web page, not the file that it is about",
        "Fetch the file itself: its address has /resolve/ in it, not /blob/",
    ),
    (
        (b"lmgg", b"fmgg", b"tjgg", b"algg"),
        "a file of the old GGML format, from before GGUF",
        "Convert the original checkpoint to GGUF; old llama.cpp has convert-llama-ggml-to-gguf.py",
    ),
    ((b"PK\x03\x04",), "a zip file (perhaps a PyTorch checkpoint)", "Give a GGUF file"),
    ((b"\x1f\x8b",), "a gzip file", "Unpack it: gunzip FILE"),
    ((b"{",), "a JSON text", "Give a GGUF file"),
)


def no_gguf(head: bytes, path: Path) -> CheckpointError:
    for beginnings, what, hint in OTHERS:
        if head.lstrip().startswith(beginnings):
            return CheckpointError(f"is not a GGUF file but {what}", where=path, hint=hint)
    if head[8:9] == b"{":
        what = "is not a GGUF file but a safetensors file"
        return CheckpointError(what, where=path, hint="Convert it: dsconvert gguf FILE")
    return CheckpointError("is not a GGUF file", where=path, why=f"it begins with {head[:8]!r}", hint=AGAIN)


def of_version(version: int, path: Path) -> CheckpointError:
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        return CheckpointError(
            "is a big-endian GGUF file, which is not read",
            where=path,
            why="it was made for a machine of the other byte order (s390x)",
            hint="Turn it: python -m gguf.scripts.gguf_convert_endian FILE little",
        )
    return CheckpointError(
        f"GGUF version {version} is not supported (2 and 3 are)",
        where=path,
        hint="Convert the model again" if version < 2 else "Update dsconvert, or fetch the file again",
    )
