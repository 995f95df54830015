"""Provenance: what an output was made from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from dsconvert.models.config import ModelConfig
from dsconvert.models.stored_rows import stored_rows
from dsconvert.models.tensor_table import Spec
from dsconvert.models.weights import WeightSource

COMMIT = re.compile(r"[0-9a-f]{40}")


def origin(folder: Path, config: ModelConfig) -> tuple[str, str]:
    """Organization (empty when unknown) and name, from the config, a hub cache folder or the folder."""
    stated = config.raw.get("_name_or_path")
    if isinstance(stated, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", stated):
        organization, name = stated.split("/")
        return organization, name
    for part in reversed(folder.absolute().parts):
        if part.startswith("models--") and part.count("--") == 2:
            _, organization, name = part.split("--")
            return organization, name
    return "", folder.resolve().name or "model"


def commit_of(folder: Path) -> str:
    """The revision of a folder of the hub's cache, which its name is; empty for any other folder."""
    return folder.name if folder.parent.name == "snapshots" and COMMIT.fullmatch(folder.name) else ""


def pairing_id(source: WeightSource, specs: Iterable[Spec]) -> str:
    """A digest of the model's weights that its text file and its projector share, 32 hex digits.

    Taken over the stored names, shapes, first rows and vectors of the language model, so it does not
    depend on the checkpoint's layout, sharding or folder, and costs one page per tensor.
    """
    digest = hashlib.sha256()
    for spec in sorted(specs, key=lambda spec: spec.gguf):
        digest.update(f"{spec.gguf} {spec.shape}\n".encode())
        digest.update(stored_rows(spec, source.rows, 0, 1 if len(spec.shape) > 1 else spec.rows).tobytes())
    return digest.hexdigest()[:32]
