"""Reads a picture from a file as pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from dsconvert.errors import MissingLibrary, UsageError, short


def load_picture(path: Path) -> npt.NDArray[np.uint8]:
    """The pixels [height, width, 3] (RGB) of a picture, turned as its camera says.

    Raises UsageError for a file that is no picture, MissingLibrary where Pillow is not installed.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingLibrary(
            "reading a picture needs Pillow, which is not installed", hint="Run `pip install pillow`"
        ) from None
    try:
        with Image.open(path) as picture:
            return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), np.uint8)
    except Exception as error:  # a file by a stranger: Pillow raises of every kind
        raise UsageError(
            "is not a picture that can be read", where=path, why=short(error), hint="Give a PNG or JPEG file"
        ) from None
