"""What MODEL_PATH stands for: a path, the embedded sample, a hub id, or the current folder."""

from __future__ import annotations

import importlib.resources
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dsconvert.checkpoints.hub_model import Repository, download, parse
from dsconvert.errors import CheckpointError, UsageError, quoted, short
from dsconvert.models.config import load_json
from dsconvert.reading import read_text

if TYPE_CHECKING:
    from dsconvert.checkpoints.remote_model import RemoteModel

SAMPLE, SAMPLE_VL, SAMPLE_MOE = "sample:", "sample-vl:", "sample-moe:"
# Folders of this package.
SAMPLES = {SAMPLE: "sample", SAMPLE_VL: "sample_vl", SAMPLE_MOE: "sample_moe"}
WEIGHTS = (".safetensors", ".bin")
REF = 1 << 10  # bytes: a branch's file in the hub's cache is a commit of 40 digits


@dataclass(frozen=True)
class ModelPath:
    """MODEL_PATH as the user gave it, and how it is fetched if it is on the hub.

    `revision` is a branch, tag or commit, `cache_dir` the folder that files are downloaded to. With `remote`
    nothing is downloaded: weights are read from the hub by ranges, when they are needed.
    """

    path: str
    revision: str | None = None
    cache_dir: Path | None = None
    remote: bool = False

    def __str__(self) -> str:
        return self.path


Model = str | Path | ModelPath | None


@dataclass(frozen=True)
class Found:
    """An existing model folder or weight file, and what the user should know of how it was chosen.

    Of a model that is read over the network, the folder holds the small files, and `remote` the others.
    """

    path: Path
    notes: tuple[str, ...] = ()
    remote: RemoteModel | None = None


def find(model: Model) -> Found:
    """The model that `model` stands for: a folder or a weight file here, or on the hub what is fetched.

    Raises UsageError also for a choice of revision, cache or way to read where nothing is fetched.
    """
    asked = model if isinstance(model, ModelPath) else ModelPath(str(model or ""))
    found = _on_this_disk(asked.path)
    if isinstance(found, Repository):
        return _on_the_hub(found, asked)
    for option, value in (
        ("--revision", asked.revision), ("--cache-dir", asked.cache_dir), ("--remote", asked.remote)
    ):  # fmt: skip
        if value:
            where = asked.path or found.path
            why = f"{where} is on this disk, and nothing is fetched"
            raise UsageError(f"{option} is for models on the hub", why=why, hint="Leave it out")
    return found


def _on_the_hub(repository: Repository, asked: ModelPath) -> Found:
    """What is fetched of a repository; raises UsageError for options that contradict each other."""
    if asked.revision and repository.revision not in (None, asked.revision):
        why = f"MODEL_PATH names {quoted(repository.revision)}, --revision {quoted(asked.revision)}"
        raise UsageError("two revisions are given", why=why, hint="Leave one of them out")
    repository = Repository(repository.name, asked.revision or repository.revision)
    if not asked.remote:
        return Found(download(repository, asked.cache_dir))
    if asked.cache_dir:
        hint = "Leave one of them out"
        raise UsageError("--cache-dir has no effect with --remote, which keeps no file", hint=hint)
    from dsconvert.checkpoints.remote_model import open_remote

    model = open_remote(repository)
    return Found(model.folder, remote=model)


def _on_this_disk(model: str) -> Found | Repository:
    """The existing folder or weight file that `model` stands for, or a repository of the hub.

    A path, the name of an embedded sample, a hub id or the address of its page when no such folder exists, or
    nothing for a current folder that holds a config.json. Of an entry of the hub's cache it is the snapshot
    of its main branch. Raises UsageError, and CheckpointError for a folder of something else.
    """
    if not model:
        if os.path.isfile("config.json"):
            return Found(Path.cwd())
        raise UsageError(
            "No model is given and this folder holds no config.json",
            hint='Give a model folder, a .safetensors file, a hub id or "sample:"',
        )
    if model in SAMPLES:
        return Found(_sample(SAMPLES[model]))
    path = Path(model)
    try:
        if path.is_dir():
            return in_folder(path)
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise UsageError(f"{quoted(model)} is not a usable path", why=short(error)) from None
    if exists and path.suffix in WEIGHTS:
        return Found(path)
    if exists:
        raise UsageError(
            "is neither a folder nor a .safetensors or .bin file",
            where=path,
            hint="A GGUF file is converted already: `dsconvert inspect FILE` shows it"
            if path.suffix == ".gguf"
            else "Give the folder that holds config.json and the weights",
        )
    repository = parse(model)
    if repository is not None and path.suffix not in WEIGHTS:
        return repository
    raise UsageError(
        f"{quoted(model)} does not exist",
        hint='Give a model folder, a .safetensors file, a hub id such as owner/name, or "sample:"',
    )


def unfetched(model: str) -> ModelPath:
    """MODEL_PATH for who reads no weights: of a model on the hub they stay there, but for who is offline."""
    if not isinstance(_on_this_disk(model), Repository):
        return ModelPath(model)
    from huggingface_hub import constants

    return ModelPath(model, remote=not constants.HF_HUB_OFFLINE)


def locate(model: Model) -> Path:
    """What `find` returns, without its notes.

    >>> sorted(path.name for path in locate("sample:").glob("*.json"))[:2]
    ['config.json', 'generation_config.json']
    """
    return find(model).path


def in_folder(folder: Path) -> Found:
    """The model in a folder: the folder itself, or a snapshot; else CheckpointError says what it holds."""
    if os.path.lexists(folder / "config.json"):
        return Found(folder)
    snapshots = _folders(folder / "snapshots") if os.path.isdir(folder / "refs") else []
    if snapshots:
        return _snapshot(folder, snapshots)
    inside = [path for path in _folders(folder) if os.path.exists(path / "config.json")]
    entries = [path for path in _folders(folder) if path.name.startswith("models--")]
    names = ", ".join(quoted(path.name) for path in (inside or entries)[-3:])
    place = shlex.quote(str((inside or entries or [folder])[-1]))
    if inside or entries:
        several = len(inside or entries)
        raise CheckpointError(
            "holds no config.json of its own, but folders of models",
            where=folder,
            why=f"{several} of them: {names}" if several <= 3 else f"{several} of them, the last: {names}",
            hint=f"Give one of them, for example {place}",
        )
    if os.path.exists(folder / "adapter_config.json"):
        base = load_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise CheckpointError(
            "is an adapter, not a model",
            where=folder,
            why=f"Its base is {quoted(base)}",
            hint="Merge it into the base first, with peft: merge_and_unload(), then save_pretrained(FOLDER)",
        )
    return Found(folder)


def _folders(folder: Path) -> list[Path]:
    """The folders inside a folder, checkpoint-1000 after checkpoint-500; none where it cannot be read."""
    try:
        inside = [path for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []
    return sorted(inside, key=lambda path: [(len(n), n) for n in re.split(r"(\d+)", path.name)])


def _snapshot(entry: Path, snapshots: list[Path]) -> Found:
    """The snapshot of an entry of the hub's cache: of the branch main, or the only one."""
    chosen = snapshots[0] if len(snapshots) == 1 else None
    main = entry / "refs" / "main"
    if os.path.exists(main):
        commit = read_text(main, REF).strip()
        chosen = next((path for path in snapshots if path.name == commit), chosen)
    if chosen is None:
        raise CheckpointError(
            "is an entry of the hub's cache without a snapshot of the branch main",
            where=entry,
            why=f"It holds {len(snapshots)} snapshots, the last {quoted(snapshots[-1].name)}",
            hint=f"Give one of them: {shlex.quote(str(snapshots[-1]))}",
        )
    return Found(chosen, (f"read from the snapshot {chosen.name} of this entry of the hub's cache",))


def _sample(name: str) -> Path:
    folder = Path(str(importlib.resources.files("dsconvert") / name))
    if not os.path.isfile(folder / "config.json"):
        raise CheckpointError(
            "The embedded sample is not installed", where=folder, hint="Install dsconvert again"
        )
    return folder
