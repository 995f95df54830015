"""Checks a projector file for what llama.cpp needs but does not require: it loads such a file and errs.

Measured on the 1.3B projector in llama.cpp: without use_gelu the relative error is 1.2e-2, no v.post_ln 0.98,
no patch bias 0.34, no position embedding 0.35, a wrong mean or std 0.45, another projector type 0.9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from converters.gguf.parse import GGUFFile
from converters.gguf.projector.keys import (
    HYBRID_TYPE,
    JANUS_PRO,
    PROJECTORS,
    TILES,
    is_projector,
    stored_vision,
    table,
)
from dsconvert.errors import CheckpointError, PlanError
from dsconvert.events import Check
from dsconvert.models.tensor_table import plan_stored
from dsconvert.vision.processor import CLIP_MEAN, CLIP_STD, HALF

# What the towers were trained with: the prefix of the keys, mean, std.
PIXELS = {
    JANUS_PRO: (("clip.vision.", HALF, HALF),),
    **dict.fromkeys(TILES, (("clip.vision.", HALF, HALF),)),
    HYBRID_TYPE: (("clip.vision.", CLIP_MEAN, CLIP_STD), ("clip.vision.low_res.", HALF, HALF)),
}


def implied_type(file: GGUFFile) -> str | None:
    """The projector type whose tensors the file holds, whatever it says; None for other models' files."""
    if "mm.high.weight" in file.tensors:
        return HYBRID_TYPE
    if "mm.model.fc.weight" in file.tensors:
        first, second = TILES
        return first if "v.class_embd" in file.tensors else second
    aligner = {name for name in file.tensors if name.startswith("mm.")}
    if aligner == {f"mm.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}:
        return JANUS_PRO
    return None


def is_known(file: GGUFFile) -> bool:
    """Whether the file is, or says that it is, a projector that is written here."""
    return is_projector(file) and (
        implied_type(file) in PROJECTORS or file.keys.get("clip.projector_type") in PROJECTORS
    )


def completeness(file: GGUFFile) -> Iterator[Check]:
    """Everything that must be in a projector file of DeepSeek-VL, from the file alone."""
    stated, implied = file.keys.get("clip.projector_type"), implied_type(file)
    fits = stated == implied
    yield Check(
        "projector",
        fits,
        f"type {stated}" if fits else f"type {stated!r}, the tensors are those of {implied!r}",
    )
    wrong = [key for key in ("clip.use_gelu", "clip.has_vision_encoder") if file.keys.get(key) is not True]
    yield Check(
        "activation", not wrong, f"{', '.join(wrong)} should be true" if wrong else "clip.use_gelu is set"
    )
    yield _pixels(file, str(implied or stated))
    yield _tensors(file, str(implied or stated))


def _pixels(file: GGUFFile, kind: str) -> Check:
    for prefix, mean, std in PIXELS.get(kind, ()):
        for key, usual in (("image_mean", mean), ("image_std", std)):
            value = file.keys.get(prefix + key)
            if not _equal(value, usual):
                found = "missing" if value is None else repr(value)[:60]
                return Check(
                    "pixels", False, f"{prefix}{key} is {found}, the tower was trained with {list(usual)}"
                )
    return Check("pixels", True, "mean and std are those of the towers")


def _equal(value: Any, usual: Sequence[float]) -> bool:
    """Whether a key holds these numbers, to the float32 that files have."""
    numbers = isinstance(value, list) and all(isinstance(x, float | int) for x in value)
    return numbers and len(value) == len(usual) and np.allclose(value, usual, rtol=0.0, atol=1e-6)


def _tensors(file: GGUFFile, kind: str) -> Check:
    """Every tensor of the table and no other, in the shapes that the keys ask for."""
    patched = replace(file, typed=file.typed | {"clip.projector_type": ("string", kind)})
    try:
        vision = stored_vision(patched)
        specs = plan_stored(table(vision), vision, {t.name: t.shape for t in file.tensors.values()})
    except CheckpointError as error:
        return Check("tensors", False, f"cannot be told: {error.what}")
    except PlanError as error:
        return Check("tensors", False, error.why or f"{error.where} {error.what}")
    return Check("tensors", True, f"all {len(specs)} are there")


def pair_faults(first: GGUFFile, second: GGUFFile) -> tuple[str, ...]:
    """Why a text file and a projector do not belong together; empty when they do."""
    text, projector = (second, first) if is_projector(first) else (first, second)
    if is_projector(text) or not is_projector(projector):
        kinds = "projectors" if is_projector(text) else "language models"
        return (f"both are {kinds}",)
    faults = []
    ids = [file.keys.get("dsconvert.pairing_id") for file in (text, projector)]
    if None in ids:
        which = text if ids[0] is None else projector
        faults.append(f"{which.path.name} has no pairing id")
    elif ids[0] != ids[1]:
        faults.append(f"their pairing ids differ ({ids[0]}, {ids[1]})")
    width = text.keys.get(f"{text.keys.get('general.architecture')}.embedding_length")
    given = projector.keys.get("clip.vision.projection_dim")
    if width != given:
        faults.append(f"the projector gives {given} values for a picture's token, the model takes {width}")
    for name in ("token", "token_id", "tokens"):
        key = f"dsconvert.image.{name}"
        a, b = (file.keys.get(key) for file in (text, projector))
        if a != b:
            faults.append(f"{key} is {a!r} and {b!r}")
    return tuple(faults)
