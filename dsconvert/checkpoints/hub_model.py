"""A model on the Hugging Face hub: what its name or page says, and its files in the local cache."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from glob import escape
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dsconvert.checkpoints.weight_files import SAFETENSORS, Shelf, choose
from dsconvert.errors import CheckpointError, UsageError, quoted, short

HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([^@\s]{1,200}))?")
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# What a model needs from the hub; the weights of one kind come with it. An output made of the hub's id is the
# one made of the whole folder, so what outputs carry or state is here.
FILES = ("*.json", "*.jinja", "LICENSE*", "README.md", "tokenizer.model", "merges.txt")
IGNORE = ("*/*", "adapter*", "consolidated*", "optimizer*", "training*")
TEMPLATES = "additional_chat_templates/*"


@dataclass(frozen=True)
class Repository:
    """A repository of the hub, "owner/name", at a branch, tag or commit; None for its main branch."""

    name: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def parse(model: str) -> Repository | None:
    """What "owner/name", "owner/name@revision" or the address of a page stands for; None for another text.

    Raises UsageError for a page of the hub that is not a model's.
    """
    plain = HUB_ID.fullmatch(model)
    if plain and plain[1].split("/")[0] not in HOSTS:
        return Repository(plain[1], plain[2])
    text = re.sub(r"^hf://", "https://huggingface.co/", model)
    url = urlsplit(text if "://" in text else f"https://{text}")
    hosts = (*HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc)
    if url.scheme not in ("https", "http") or url.netloc not in hosts or not url.netloc:
        return None
    parts = [unquote(part) for part in url.path.split("/") if part]
    parts = parts[1:] if parts[:1] == ["models"] else parts
    found = HUB_ID.fullmatch("/".join(parts[:2]))
    if found is None or parts[0] in ("datasets", "spaces", "collections", "papers", "docs", "api"):
        raise UsageError(
            f"{quoted(model)} is not the page of a model", hint="Give https://huggingface.co/OWNER/NAME"
        )
    return Repository(found[1], found[2] or _revision(model, parts[2:]))


def _revision(model: str, rest: list[str]) -> str | None:
    """The revision of /tree/REVISION, or of a file's page; a branch's name may hold slashes as refs/pr/1."""
    if len(rest) < 2 or rest[0] not in ("tree", "blob", "resolve", "commit"):
        return None
    taken = 3 if rest[1] == "refs" else 1
    if rest[0] == "tree" and len(rest) > 1 + taken:
        raise UsageError(
            f"{quoted(model)} is a folder inside a repository",
            hint=f"Download it, for example with `hf download --include '{rest[-1]}/*'`, and give its path"
            if re.fullmatch(r"[\w.-]+", rest[-1])
            else "Download it and give its path",
        )
    return "/".join(rest[1 : 1 + taken])


def is_small(name: str) -> bool:
    """Whether a file of a repository is one of those that a model needs beside its weights."""
    if any(fnmatchcase(name, pattern) for pattern in IGNORE):
        return fnmatchcase(name, TEMPLATES)
    return any(fnmatchcase(name, pattern) for pattern in FILES)


def download(repository: Repository, cache: Path | None = None) -> Path:
    """The model's files from the hub or from the local cache, `cache` or the client's own.

    That is what it needs and the weights that are read of it, safetensors where it has them. A download that
    was broken off goes on where it was. Raises CheckpointError.
    """
    import huggingface_hub.utils as client
    from huggingface_hub import snapshot_download

    if not sys.stderr.isatty():
        getattr(client, "disable_progress_bars")()  # noqa: B009 - its types leave it out
    fetch = partial(snapshot_download, repository.name, cache_dir=cache)
    try:
        small = fetch(revision=repository.revision, allow_patterns=list(FILES), ignore_patterns=list(IGNORE))
        folder = Path(small)
        wanted = [escape(name) for name in _weights_of(repository, folder)]
        fetch(revision=folder.name, allow_patterns=[*wanted, TEMPLATES])
    except CheckpointError:
        raise
    except Exception as error:  # the library lets its HTTP client's errors through
        raise hub_error(repository, error) from None
    return folder


def _weights_of(repository: Repository, folder: Path) -> tuple[str, ...]:
    """The weight files that are read of a repository whose small files are in `folder`."""
    from huggingface_hub import HfApi

    try:
        names, unreached = HfApi().list_repo_files(repository.name, revision=folder.name), None
    except Exception as error:  # no network, or none is allowed: what is in the cache may be all of it
        names, unreached = [], error
    top = [name for name in names if "/" not in name]
    try:
        return choose(Shelf(folder, dict.fromkeys(top, SAFETENSORS.read))).names
    except CheckpointError as error:
        if unreached is not None:
            raise hub_error(repository, unreached) from None
        error.where = str(repository)
        raise


def hub_error(repository: Repository, error: Exception) -> CheckpointError:
    """The client's error as one that says what to do."""
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE:
        what, hint = "is not in the local cache", "HF_HUB_OFFLINE is set: unset it to download"
    elif isinstance(error, errors.GatedRepoError):
        what, hint = "is gated", "Accept its terms on its page, then run `hf auth login`"
    elif isinstance(error, errors.RevisionNotFoundError):
        what, hint = "has no such revision", "Look at the branches and tags on its page"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "is neither a folder here nor a repository on the hub"
        hint = "Check the spelling; for a private one run `hf auth login`"
    elif isinstance(error, errors.LocalEntryNotFoundError):
        what, hint = "cannot be reached", "Check the network, or give the path of a local folder"
    else:
        what, hint = "cannot be downloaded", "Try again, or download it by hand and give its folder"
    return CheckpointError(what, where=repository, why=short(error), hint=hint)
