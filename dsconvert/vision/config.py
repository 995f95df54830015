"""One normalised view of a model's image towers and of what its processor does to a picture.

Every layout gives the same view; what config.json says of the towers is read in tower_sizes.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconvert.models.architectures import tower_model
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Table
from dsconvert.models.towers import TowerModel
from dsconvert.vision import processor as pictures
from dsconvert.vision import tower_sizes
from dsconvert.vision.processor import Pixels, Processor, wrong
from dsconvert.vision.tower_sizes import Parts


@dataclass(frozen=True)
class Tower:
    """A vision transformer: sizes, and the normalisation of the pixels it takes."""

    image_size: int
    patch_size: int
    width: int
    mlp: int
    layers: int
    heads: int
    eps: float
    pixels: Pixels
    kv_heads: int

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class Sam(Tower):
    """SAM's image encoder: windowed attention but in some layers, and a neck of `channels`.

    `reduced` are the channels of the two convolutions behind, each of which halves the grid.
    """

    window: int
    global_layers: tuple[int, ...]
    channels: int
    reduced: tuple[int, int]

    @property
    def reduced_grid(self) -> int:
        """Positions along one side of what comes out."""
        return self.grid // 4


@dataclass(frozen=True)
class VisionConfig:
    """The towers of a model: one transformer, or one for the small picture and SAM for the big one.

    `model` is what its kind of models has, `architecture` the class that config.json names. `projection` is
    the width of the embeddings, which is the decoder's. `activation` is "gelu" (exact) or
    "gelu_pytorch_tanh". `processor` says what is done to a picture and where its tokens stand in a prompt.
    """

    model: TowerModel
    architecture: str
    vit: Tower
    sam: Sam | None
    projection: int
    activation: str
    processor: Processor
    tied: bool = False

    @property
    def configs(self) -> dict[str, dict[str, Any]]:
        """The towers' parts of transformers' config."""
        low = tower_keys(self.vit, self.activation)
        high = tower_keys(self.sam, self.activation) if self.sam is not None else {}
        return self.model.configs(low, high, self.projection)

    @property
    def tokens(self) -> int:
        """Embeddings of one picture."""
        return self.model.tokens(self)

    @property
    def dims(self) -> dict[str, int]:
        """The sizes by the letters that the tables of towers use."""
        low, high = self.vit, self.sam
        dims = {
            "c": low.width,
            "f": low.mlp,
            "n": self.model.positions(self),
            "p": low.patch_size,
            "vit": low.layers,
        }
        dims |= {"d": self.projection, "h": self.projection // 2, "kv": low.width // low.heads * low.kv_heads}
        if high is not None:
            dims |= {"s": high.width, "3s": 3 * high.width, "m": high.mlp, "g": high.grid}
            dims |= {"r": high.patch_size, "sam": high.layers, "hd": high.width // high.heads}
            first, last = high.reduced
            dims |= {"a": high.channels, "b": first, "e": last, "ce": low.width + last}
            dims["rel"] = 2 * high.window - 1
            dims |= {f"rel.{layer}": 2 * high.grid - 1 for layer in high.global_layers}
        return dims


def tower_keys(tower: Tower, activation: str) -> dict[str, Any]:
    """The sizes of a tower under the names of transformers' config classes."""
    found: dict[str, Any] = {
        "hidden_act": activation,
        "hidden_size": tower.width,
        "image_size": tower.image_size,
        "layer_norm_eps": tower.eps,
        "num_attention_heads": tower.heads,
        "num_hidden_layers": tower.layers,
        "patch_size": tower.patch_size,
    }
    if not isinstance(tower, Sam):
        kv = {} if tower.kv_heads == tower.heads else {"num_key_value_heads": tower.kv_heads}
        return found | {"intermediate_size": tower.mlp} | kv
    own = (2 * tower.channels, 4 * tower.channels)
    return found | {
        "global_attn_indexes": list(tower.global_layers),
        "mlp_dim": tower.mlp,
        "output_channels": tower.channels,
        "window_size": tower.window,
        **({} if tower.reduced == own else {"downsample_channels": list(tower.reduced)}),
    }


def has_towers(config: ModelConfig) -> bool:
    """Whether the config is of a model with vision towers."""
    return tower_model(config.architecture, config.raw) is not None


def load_vision(folder: Path, config: ModelConfig) -> VisionConfig:
    """Read and check what config.json and the processor files say about pictures.

    Raises CheckpointError for towers that are not known here, for missing files, and for contradictions
    between them.
    """
    where = folder / "config.json"
    model, (low, high) = _parts(config, where)
    if model.chained:
        processor = pictures.chained_processor(folder)
    elif config.architecture == model.hf_class:
        processor = pictures.transformers_processor(folder, high is not None, model.around)
    else:
        processor = pictures.original_processor(folder, low, high, model.around)
    vision = _assembled(model, config, (low, high), processor, where)
    _check(vision, where)
    return vision


def towers_alone(folder: Path, config: ModelConfig) -> tuple[Table, VisionConfig]:
    """The towers' table and sizes by config.json alone, whatever processor files there are; CheckpointError.

    Of the processor it has what DeepSeek-VL's is like.
    """
    where = folder / "config.json"
    model, (low, high) = _parts(config, where)
    pixels = [Pixels(part["image_size"], *2 * (pictures.HALF,)) for part in (low, high) if part is not None]
    small, big = pixels[0], pixels[1] if high is not None else None
    processor = Processor(small, big, (127, 127, 127), "bicubic", 14, "", tokens=0)
    vision = _assembled(model, config, (low, high), processor, where)
    return model.tables[config.architecture], vision


def _parts(config: ModelConfig, where: Path) -> tuple[TowerModel, Parts]:
    model = tower_model(config.architecture, config.raw)
    assert model is not None  # asked for a model with towers
    read = tower_sizes.chained_parts if model.chained else tower_sizes.original_parts
    if config.architecture == model.hf_class:
        read = tower_sizes.transformers_parts
    return model, read(config.raw, config, model, where)


def _assembled(
    model: TowerModel, config: ModelConfig, parts: Parts, processor: Processor, where: Path
) -> VisionConfig:
    low, high = parts
    vit = Tower(pixels=processor.low, **tower_sizes.sizes_of(low, where))
    sam = _sam(high, processor, where) if high is not None else None
    activation = {str(part["hidden_act"]) for part in parts if part is not None and "hidden_act" in part}
    if not activation <= {"gelu", "gelu_pytorch_tanh"} or len(activation) != 1:
        raise wrong(where, "hidden_act", f"is {sorted(activation)}, should be gelu in every tower")
    width = config.hidden_size
    return VisionConfig(model, config.architecture, vit, sam, width, activation.pop(), processor)


def _sam(part: Mapping[str, Any], processor: Processor, where: Path) -> Sam:
    sizes = tower_sizes.sizes_of(part, where)
    layers, window, channels = (
        part[key] for key in ("global_attn_indexes", "window_size", "output_channels")
    )
    if (
        not isinstance(layers, list)
        or not layers
        or not all(isinstance(layer, int) and 0 <= layer < sizes["layers"] for layer in layers)
    ):
        raise wrong(where, "global_attn_indexes", f"is {str(layers)[:80]}, should name some of the layers")
    if not all(isinstance(value, int) and 0 < value < 1 << 20 for value in (window, channels)):
        raise wrong(where, "window_size or output_channels", f"are {window!r} and {channels!r}")
    reduced = part.get("downsample_channels", [2 * channels, 4 * channels])
    if not isinstance(reduced, list) or len(reduced) != 2 or not all(isinstance(n, int) for n in reduced):
        raise wrong(where, "downsample_channels", f"is {str(reduced)[:40]}, should be two numbers")
    more = {"channels": channels, "reduced": (reduced[0], reduced[1]), "window": window}
    return Sam(pixels=processor.high or processor.low, global_layers=tuple(layers), **more, **sizes)


def _check(vision: VisionConfig, where: Path) -> None:
    """Contradictions between the processor files and the config."""
    processor, low, high = vision.processor, vision.vit, vision.sam
    if vision.model.chained:
        _check_chained(vision, where)
        return
    sizes = [("image_size", low.image_size, processor.low.image_size)]
    sizes.append(("the number of image tokens", vision.tokens, processor.tokens))
    if high is not None and processor.high is not None:
        sizes.append(("the big picture's image_size", high.image_size, processor.high.image_size))
    for name, ours, theirs in sizes:
        if ours != theirs:
            raise wrong(where, name, f"is {ours} by config.json, {theirs} by the processor files")


def _check_chained(vision: VisionConfig, where: Path) -> None:
    """See that the second transformer takes what comes out of SAM."""
    assert vision.sam is not None
    given, taken = vision.sam.reduced[1], vision.vit.width
    if given != taken:
        raise wrong(where, "downsample_channels", f"ends with {given}, the transformer behind takes {taken}")
