"""What MODEL_PATH stands for: a path, the embedded sample, a hub id, or the current folder."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from dsconvert.errors import CheckpointError, UsageError
from dsconvert.reading import short
from dsconvert.safetensors_header import quoted

SAMPLE, SAMPLE_VL = "sample:", "sample-vl:"
SAMPLES = {SAMPLE: "sample", SAMPLE_VL: "sample_vl"}  # folders of this package
WEIGHTS = (".safetensors", ".bin")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# What a model needs from the hub; the weights of one kind come with it.
HUB_FILES = ("*.json", "*.jinja", "LICENSE*")
HUB_IGNORE = ("*/*", "adapter*", "consolidated*", "optimizer*", "training*")


def locate(model: str | Path | None) -> Path:
    """The existing folder or weight file that `model` stands for.

    A path, "sample:" or "sample-vl:", a hub id when no such folder exists, or nothing for a current folder
    that holds a config.json. Raises UsageError, and CheckpointError for what the hub cannot give.
    """
    if not model:
        if Path("config.json").is_file():
            return Path.cwd()
        raise UsageError(
            "No model is given and this folder holds no config.json",
            hint='Give a model folder, a .safetensors file, a hub id or "sample:"',
        )
    if model in SAMPLES:
        return _sample(SAMPLES[str(model)])
    path = Path(model)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"{quoted(model)} is no usable path", why=short(error)) from None
    if exists and path.suffix in WEIGHTS:
        return path
    if exists:
        raise UsageError(
            "is neither a folder nor a .safetensors or .bin file",
            where=path,
            hint="A GGUF file is converted already: `dsconvert inspect FILE` shows it"
            if path.suffix == ".gguf"
            else "Give the folder that holds config.json and the weights",
        )
    if HUB_ID.fullmatch(str(model)) and path.suffix not in WEIGHTS:
        return _download(str(model))
    raise UsageError(
        f"{quoted(model)} does not exist",
        hint='Give a model folder, a .safetensors file, a hub id such as owner/name, or "sample:"',
    )


def _sample(name: str) -> Path:
    folder = Path(str(importlib.resources.files("dsconvert") / name))
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            "The embedded sample is not installed", where=folder, hint="Install dsconvert again"
        )
    return folder


def _download(repository: str) -> Path:
    """The model's files from the Hugging Face hub or its local cache; safetensors where it has them."""
    from huggingface_hub import snapshot_download

    try:
        for suffix in WEIGHTS:
            patterns = [*HUB_FILES, "*" + suffix]
            folder = Path(
                snapshot_download(repository, allow_patterns=patterns, ignore_patterns=list(HUB_IGNORE))
            )
            if any(folder.glob("*" + suffix)):
                return folder
    except Exception as error:  # the library lets its HTTP client's errors through
        raise _hub_error(repository, error) from None
    raise CheckpointError("has no weights on the hub", where=repository, hint="Look at its file list")


def _hub_error(repository: str, error: Exception) -> CheckpointError:
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        what, hint = "is not in the local cache", "HF_HUB_OFFLINE is set: unset it to download"
    elif isinstance(error, errors.GatedRepoError):
        what, hint = "is gated", "Accept its terms on its page, then run `hf auth login`"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "is neither a folder here nor a repository on the hub"
        hint = "Check the spelling; for a private one run `hf auth login`"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        what, hint = "cannot be reached", "Check the network, or give the path of a local folder"
    else:
        what, hint = "cannot be downloaded", "Try again, or download it by hand and give its folder"
    return CheckpointError(what, where=repository, why=short(error), hint=hint)
