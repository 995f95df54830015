"""The vision part of a conversion: towers matched with the table, the picture's token, the chat template."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import Spec, plan
from dsconvert.models.towers import spelled
from dsconvert.vision.config import VisionConfig, has_towers, load_vision
from dsconvert.vision.processor import CLIP_MEAN, CLIP_STD, HALF
from tokenizer_tools import chat_template
from tokenizer_tools.chat_template import ChatTemplates
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.vision_template import Dialogue, check_around, image_token, vision_template

MODEL_TEMPLATE = "model"  # the name under which the checkpoint's own template travels


@dataclass(frozen=True)
class Towers:
    """A checkpoint's towers: their numbers, their tensors, and the token that marks a picture."""

    vision: VisionConfig
    specs: tuple[Spec, ...]
    token: str
    token_id: int
    unused: tuple[str, ...]  # tensors that no forward pass uses, left out
    generating: tuple[str, ...]  # tensors that make pictures, left out

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know before the conversion."""
        return tuple(f"the processor files {found}" for found in unusual_pixels(self.vision))

    @property
    def left_out(self) -> tuple[str, ...]:
        """A line on the unused tensors, and one on those that make pictures, where there are any."""
        unused = (re.sub(r"\.(attn_pool|head)\..*|\.(weight|bias)$", r".\1", n) for n in self.unused)
        making = (re.sub(r"^((model\.)?\w+)\..*", r"\1", name) for name in self.generating)
        said = []
        for why, parts in (
            ("no forward pass uses them", unused),
            ("they make pictures, which no runtime of these files does", making),
        ):
            listed = ", ".join(f"{count} of {name.rstrip('.')}" for name, count in Counter(parts).items())
            said += [f"left out, since {why}: {listed}"] if listed else []
        return tuple(said)

    @property
    def readable(self) -> bool:
        """Whether a runtime has these towers: that of two pictures at once none has."""
        return self.vision.processor.high is None

    @property
    def dialogue(self) -> Dialogue:
        """How the model's prompts are written."""
        return dialogue(self.vision)


def plan_towers(checkpoint: Checkpoint, config: ModelConfig, tokenizer: TokenizerData) -> Towers | None:
    """Match the towers with their table; None for a model without them.

    Raises PlanError for tensors that are missing, unknown or misshapen, CheckpointError for what config,
    processor files and tokenizer contradict each other in.
    """
    if not has_towers(config):
        return None
    vision = load_vision(checkpoint.folder, config)
    shapes = checkpoint.shapes()
    specs = tuple(plan(spelled(vision.model.tables[config.architecture], shapes), vision, shapes))
    checkpoint.check_readable(name for spec in specs for name in spec.names)
    stated = config.raw.get("image_token_id")
    token, token_id = image_token(tokenizer, vision.processor.token, stated, checkpoint.folder)
    unused, generating = (
        tuple(name for name in shapes if any(re.fullmatch(pattern, name) for pattern in patterns))
        for patterns in (vision.model.unused, vision.model.generating)
    )
    check_around(tokenizer, vision.processor.around, checkpoint.folder)
    return Towers(vision, specs, token, token_id, unused, generating)


def dialogue(vision: VisionConfig) -> Dialogue:
    """How a model's prompts are written, with pictures."""
    around = vision.processor.around
    return Dialogue(*vision.model.roles, *around, own_line=around != ("", ""))


def with_template(tokenizer: TokenizerData, found: Towers) -> TokenizerData:
    """The tokenizer with a chat template that takes strings and pictures; the own one is kept by name."""
    special = tokenizer.special
    names = {f"{n}_token": tokenizer.tokens[special[n]] if n in special else "" for n in ("bos", "eos")}
    own = chat_template.check(tokenizer.chat, **names)
    named = dict(tokenizer.chat.named)
    if tokenizer.chat.default:
        named[MODEL_TEMPLATE] = tokenizer.chat.default
    chat = ChatTemplates(vision_template(found.token, found.dialogue), named, tokenizer.chat.notes)
    notes = tuple(note for note in tokenizer.notes if note not in own)
    return replace(tokenizer, chat=chat, notes=notes)


def unusual_pixels(vision: VisionConfig) -> list[str]:
    """Normalisations that are not those which the towers were trained with: a hint of a wrong file."""
    found = []
    for name, pixels, usual in (
        ("SAM" if vision.model.chained else "SigLIP", vision.processor.low, (HALF, HALF)),
        ("SAM", vision.processor.high, (CLIP_MEAN, CLIP_STD)),
    ):
        if pixels is not None and (pixels.mean, pixels.std) != usual:
            given = f"mean {list(pixels.mean)} and std {list(pixels.std)}"
            found.append(f"give {name} {given}; it was trained with {list(usual[0])}, {list(usual[1])}")
    return found
