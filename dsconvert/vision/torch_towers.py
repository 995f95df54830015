"""Image embeddings in torch, from a checkpoint or from a projector file alone.

The towers are transformers' own modules, made on the meta device with the weights assigned, so that the
arithmetic is the reference's. Weights come by their GGUF names, which every layout has in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.errors import CheckpointError, UsageError
from dsconvert.models.stored_rows import stored_rows
from dsconvert.models.tensor_table import Spec, expand
from dsconvert.models.weights import WeightSource, widened
from dsconvert.vision.config import VisionConfig
from dsconvert.vision.processor import Pixels

Floats = npt.NDArray[np.float32]
Weights = Callable[[str], Floats]  # GGUF name -> the values in the stored layout


@dataclass(frozen=True)
class Pictures:
    """Pixels as the towers take them, normalised: `low` [n, 3, side, side]; `high` for the hybrid only."""

    low: Floats
    high: Floats | None = None


@dataclass(frozen=True)
class EmbeddingError:
    """How far image embeddings are from the reference's: relative error and cosine of the worst token."""

    relative: float
    cosine: float
    max_abs: float
    worst_relative: float


def checkpoint_weights(source: WeightSource, specs: Iterable[Spec], vision: VisionConfig) -> Weights:
    """A checkpoint's tower tensors by GGUF name; `specs` are the plan of its table."""
    by_name = {spec.gguf: spec for spec in specs}

    def read(name: str) -> Floats:
        spec = by_name[name]
        return widened(stored_rows(spec, source.rows, 0, spec.rows)).reshape(spec.shape)

    return read


def load_towers(weights: Weights, vision: VisionConfig) -> Any:
    """transformers' model of these towers without its decoder, in float32.

    Raises CheckpointError when transformers refuses the numbers or a tensor is missing.
    """
    import torch

    table = vision.model.tables[vision.model.hf_class]
    text = {"hidden_size": vision.projection, "num_hidden_layers": 1, "vocab_size": 8}  # it is not run
    text |= {"intermediate_size": 8, "num_attention_heads": 1, "head_dim": 2}
    with torch.device("meta"):
        model = vision.model.torch_model({"text_config": text, **vision.configs})
    model.language_model = None
    state = {
        spec.hf.removeprefix("model."): torch.from_numpy(_shaped(weights(spec.gguf), spec))
        for spec in expand(table, vision)
    }
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except (RuntimeError, KeyError) as error:
        raise CheckpointError("the towers do not fit transformers' modules", why=str(error)[:300]) from None
    for module in model.modules():  # what is computed and in no checkpoint
        if getattr(module, "position_ids", None) is not None:
            module.position_ids = torch.arange(vision.model.positions(vision))[None]
    return model.requires_grad_(False).eval()


def _shaped(values: Floats, spec: Spec) -> Floats:
    return np.require(values.reshape(spec.source), requirements="W")  # torch warns of a mapped file's


def embed(model: Any, pictures: Pictures) -> Floats:
    """The embeddings of pictures, as they take the place of the image tokens: [n, tokens, projection]."""
    import torch

    found = []
    with torch.no_grad():
        for i in range(len(pictures.low)):
            inputs = [torch.from_numpy(pictures.low[i : i + 1])]
            if pictures.high is not None:
                inputs.append(torch.from_numpy(pictures.high[i : i + 1]))
            features = model.get_image_features(*inputs, return_dict=True).pooler_output
            found.append(torch.stack(list(features)))
    return np.asarray(torch.cat(found).numpy(), np.float32)


def exact_pictures(vision: VisionConfig, rgb: npt.NDArray[np.uint8]) -> Pictures:
    """Pixels of pictures [n, side, side, 3] that have the model's size already, so that nothing is resized.

    The hybrid's small picture is the big one resized, bilinear, as the original's tower does it.
    """
    side = (vision.processor.high or vision.processor.low).image_size
    if rgb.dtype != np.uint8 or rgb.shape[1:] != (side, side, 3):
        raise UsageError(
            f"pictures of shape {list(rgb.shape)} and type {rgb.dtype}",
            hint=f"Give uint8 [n, {side}, {side}, 3]",
        )
    scaled = rgb.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    low, high = vision.processor.low, vision.processor.high
    if high is None:
        return Pictures(_normalised(scaled, low))
    import torch

    size = low.image_size
    small = torch.nn.functional.interpolate(
        torch.from_numpy(scaled), size=(size, size), mode="bilinear", align_corners=False, antialias=True
    )
    return Pictures(_normalised(small.numpy(), low), _normalised(scaled, high))


def _normalised(scaled: Floats, pixels: Pixels) -> Floats:
    mean, std = (np.array(x, np.float32)[:, None, None] for x in (pixels.mean, pixels.std))
    return np.ascontiguousarray((scaled - mean) / std, np.float32)


def synthetic_picture(vision: VisionConfig, seed: int = 0) -> npt.NDArray[np.uint8]:
    """A picture [1, side, side, 3] of the model's size: smooth colours, edges and noise, from a seed."""
    side = (vision.processor.high or vision.processor.low).image_size
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    waves = [np.sin(rng.uniform(2, 30) * x + rng.uniform(2, 30) * y + rng.uniform(0, 6)) for _ in range(3)]
    edges = ((x * 8).astype(int) + (y * 6).astype(int)) % 2 * 60
    noise = rng.normal(0, 12, (side, side, 3))
    picture = 110 + 55 * np.stack(waves, -1) + edges[..., None] + noise
    return np.asarray(np.clip(picture, 0, 255).astype(np.uint8)[None])


def embedding_error(reference: Floats, found: Floats) -> EmbeddingError:
    """Compare embeddings [..., tokens, d] of the same pictures."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (reference, found))
    norms = np.linalg.norm(a, axis=1)
    errors = np.linalg.norm(b - a, axis=1)
    cosine = np.sum(a * b, axis=1) / (norms * np.linalg.norm(b, axis=1))
    return EmbeddingError(
        float(np.linalg.norm(b - a) / np.linalg.norm(a)),
        float(cosine.min()),
        float(np.abs(b - a).max()),
        float((errors / norms).max()),
    )
