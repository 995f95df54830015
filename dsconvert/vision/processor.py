"""What the processor of a model does to a picture, from the processor files of both published layouts.

Sources: deepseek_vl/models/{image_processing_vlm,processing_vlm,clip_encoder}.py of the original code, and
janus/models' files of these names; transformers' image processors, whose defaults absent keys take.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models.config import load_json

PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZER = "tokenizer_config.json"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # SigLIP's mean and std; SAM's, in DeepSeek-VL, are CLIP's
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
Triple = tuple[float, float, float]
Around = tuple[str, str]


@dataclass(frozen=True)
class Pixels:
    """A square picture as a tower takes it: its side, and what is subtracted from and divides 0 ... 1."""

    image_size: int
    mean: Triple
    std: Triple


@dataclass(frozen=True)
class Processor:
    """From a picture to pixels and prompt: resized so that the longer side fits, padded to a square, scaled.

    `low` is SigLIP's picture, `high` SAM's, of which `low` is made. `pad` is the colour around a picture
    that is not square, 0 ... 255. `token` marks a picture's place in a prompt and stands there `tokens`
    times; "" where only its id is stated. `around` are the tokens before and after, "" for none.
    """

    low: Pixels
    high: Pixels | None
    pad: tuple[int, int, int]
    resample: str
    min_size: int
    token: str
    tokens: int
    around: Around = ("", "")


def original_processor(
    folder: Path, low: Mapping[str, Any], high: Mapping[str, Any] | None, around: Around
) -> Processor:
    """The processor of a VLMImageProcessor; `low` and `high` are the towers in config.json.

    The towers of DeepSeek-VL 7B normalise inside. `around` are the model's own tokens around a picture.
    Raises CheckpointError for missing files and contradictions.
    """
    image, chat = _files(folder)
    where = folder / PREPROCESSOR
    mean, std = _triple(image, "image_mean", where, CLIP_MEAN), _triple(image, "image_std", where, CLIP_STD)
    inside = "pixel_mean" in (high or low)
    if image.get("do_normalize", True) is inside:
        raise wrong(
            where,
            "do_normalize",
            f"is {image.get('do_normalize', True)} while the towers {'do' if inside else 'do not'} normalise",
        )
    size = _size(image.get("image_size"), where, "image_size")
    config = folder / "config.json"
    if high is None:
        small, big = Pixels(size, mean, std), None
        if inside:
            small = _stated(low, size, config)
    else:
        small, big = (
            _stated(low, _size(low.get("image_size"), config, "image_size"), config),
            _stated(high, size, config),
        )
    return Processor(
        small,
        big,
        _colour(mean),
        "bicubic",
        _size(image.get("min_size", 14), where, "min_size"),
        _tag(chat, folder / PROCESSOR),
        _size(chat.get("num_image_tokens", 576), folder / PROCESSOR, "num_image_tokens"),
        _around(chat, around, ("image_start_tag", "image_end_tag"), folder / PROCESSOR),
    )


def transformers_processor(folder: Path, hybrid: bool, around: Around) -> Processor:
    """The processor of one picture, or of a small and a big one where `hybrid`; raises CheckpointError."""
    image, chat = _files(folder)
    where = folder / (PREPROCESSOR if (folder / PREPROCESSOR).is_file() else PROCESSOR)
    for flag in ("do_normalize", "do_rescale", "do_resize"):
        if image.get(flag, True) is not True:
            raise wrong(where, flag, f"is {image[flag]!r}, should be true")
    high = _pixels(image, "high_res_", where, 1024) if hybrid else None
    low = _pixels(image, "", where, 384)
    resample = image.get("high_res_resample" if hybrid else "resample", 3)
    if not isinstance(resample, int) or resample not in RESAMPLE:
        raise wrong(where, "resample", f"is {resample!r}, known are {RESAMPLE}")
    return Processor(
        low,
        high,
        _colour((high or low).mean),
        RESAMPLE[resample],
        _size(image.get("min_size", 14), where, "min_size"),
        "",
        _size(chat.get("num_image_tokens", 576), folder / PROCESSOR, "num_image_tokens"),
        _tokens_around(folder, around),
    )


def chained_processor(folder: Path) -> Processor:
    """The processor of DeepSeek-OCR, which its code does without files; what files there are count."""
    found: dict[str, Any] = {}
    for name in (PREPROCESSOR, PROCESSOR):
        if (folder / name).is_file():
            stated = load_json(folder / name)
            nested = stated.get("image_processor")
            found |= {**stated, **(nested if isinstance(nested, dict) else {})}
    where = folder / PROCESSOR
    mean, std = _triple(found, "image_mean", where, HALF), _triple(found, "image_std", where, HALF)
    token = found.get("image_token", "<image>")
    if not isinstance(token, str) or not token:
        raise wrong(where, "image_token", f"is {str(token)[:40]!r}, should be a token")
    return Processor(Pixels(1024, mean, std), None, _colour(mean), "bicubic", 14, token, tokens=0)


def _tokens_around(folder: Path, around: Around) -> Around:
    """Of a model that has any, those that the tokenizer's file names, by itself or among other tokens."""
    if around == ("", ""):
        return around
    stated = load_json(folder / TOKENIZER)
    further = stated.get("extra_special_tokens")
    named = {**(further if isinstance(further, dict) else {}), **stated}
    return _around(named, around, ("boi_token", "eoi_token"), folder / TOKENIZER)


def _around(stated: Mapping[str, Any], around: Around, keys: Around, where: Path) -> Around:
    """The tokens around a picture as files state them, where the model has any."""
    if around == ("", ""):
        return around
    begin, end = (stated.get(key, usual) for key, usual in zip(keys, around, strict=True))
    for key, value in zip(keys, (begin, end), strict=True):
        if not isinstance(value, str) or not value:
            raise wrong(where, key, f"is {str(value)[:40]!r}, should be a token")
    return str(begin), str(end)


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The picture's part and the prompt's part; transformers 5 writes both into one file."""
    chat = load_json(folder / PROCESSOR)
    nested = chat.get("image_processor")
    if isinstance(nested, dict) and not (folder / PREPROCESSOR).is_file():
        image, where = nested, folder / PROCESSOR
    else:
        image, where = load_json(folder / PREPROCESSOR), folder / PREPROCESSOR
    factor = image.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or not math.isclose(factor, 1 / 255, rel_tol=1e-6):
        raise wrong(where, "rescale_factor", f"is {factor!r}, runtimes take 1/255")
    return image, chat


def _stated(tower: Mapping[str, Any], size: int, where: Path) -> Pixels:
    """The pixels of a tower that normalises inside."""
    mean, std = (numbers(tower.get(key), 3, where, key) for key in ("pixel_mean", "pixel_std"))
    if _size(tower.get("image_size", size), where, "image_size") != size:
        raise wrong(where, "image_size", f"is {tower.get('image_size')!r}, {PREPROCESSOR} says {size}")
    return Pixels(size, (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _pixels(image: Mapping[str, Any], prefix: str, where: Path, default: int) -> Pixels:
    size = image.get(prefix + "size", {"height": default, "width": default})
    if not isinstance(size, dict) or size.get("height") != size.get("width"):
        raise wrong(where, prefix + "size", f"is {str(size)[:60]}, should have one height and width")
    return Pixels(
        _size(size.get("height"), where, prefix + "size"),
        _triple(image, prefix + "image_mean", where, CLIP_MEAN),
        _triple(image, prefix + "image_std", where, CLIP_STD),
    )


def _colour(mean: Triple) -> tuple[int, int, int]:
    """The padding of both implementations: the mean, cut to whole numbers."""
    red, green, blue = (int(value * 255) for value in mean)
    return red, green, blue


def _triple(part: Mapping[str, Any], key: str, where: Path, default: Triple) -> Triple:
    value = part.get(key)
    if value is None:
        return default
    red, green, blue = numbers(value, 3, where, key)
    return red, green, blue


def numbers(value: object, count: int, where: object, key: str) -> tuple[float, ...]:
    """`count` positive numbers; raises CheckpointError naming the key."""
    if not isinstance(value, list) or len(value) != count:
        raise wrong(where, key, f"is {str(value)[:60]!r}, should be {count} numbers")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int | float) or not 0 < item < 1e6:
            raise wrong(where, key, f"holds {str(item)[:40]!r}, should hold positive numbers")
    return tuple(map(float, value))


def _size(value: object, where: Path, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 20:
        raise wrong(where, key, f"is {str(value)[:40]!r}, should be a positive whole number")
    return value


def _tag(chat: Mapping[str, Any], where: Path) -> str:
    if chat.get("sft_format", "deepseek") != "deepseek":
        raise wrong(where, "sft_format", f"is {str(chat['sft_format'])[:40]!r}, only 'deepseek' is known")
    tag = chat.get("image_tag", "<image_placeholder>")
    if not isinstance(tag, str) or not tag:
        raise wrong(where, "image_tag", f"is {str(tag)[:40]!r}, should be a token")
    return tag


def wrong(where: object, key: str, why: str) -> CheckpointError:
    """The error of a value that no model with towers here can have."""
    return CheckpointError(
        f"{key!r} cannot be used",
        where=where,
        why=f"{key} {why}",
        hint="Compare the processor files and config.json with the published ones",
    )
