"""Proof of a projector and its text file on a picture: embeddings, and a question about it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from converters.gguf.as_model import open_model
from converters.gguf.parse import GGUFFile
from converters.gguf.projector.completeness import completeness, pair_faults
from converters.gguf.projector.keys import IMAGE_LIMITS, open_projector, stored_vision
from converters.gguf.sampled_weights import check_weights
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.errors import CheckpointError
from dsconvert.events import Check, Event, Step
from dsconvert.libraries import TORCH, need
from dsconvert.models.config import ModelConfig
from dsconvert.models.language_model import language_model
from dsconvert.proof import thresholds
from dsconvert.proof.options import Mode
from dsconvert.vision import prompt as picture_prompt
from dsconvert.vision import torch_towers
from dsconvert.vision.plan import Towers
from dsconvert.vision.torch_towers import Floats
from tokenizer_tools.library import tokens
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.vision_template import question

QUICK_PARAMETERS = 50_000_000  # of towers whose embeddings a quick proof compares
READABLE = ("projector", "tensors")  # the checks without which a projector computes no embeddings


@dataclass(frozen=True)
class Pictured:
    """A checkpoint with vision towers, which a projector and its text file are held against."""

    checkpoint: Checkpoint
    config: ModelConfig
    tokenizer: TokenizerData = field(repr=False)
    towers: Towers = field(repr=False)


def projector_quant(file: GGUFFile) -> str:
    """The coarsest type of a projector's tensors: that of its matrices, as far as their rows fit it."""
    return max((t.qtype.name for t in file.tensors.values()), key=lambda name: IMAGE_LIMITS.get(name, 0.0))


def embeddings(model: Pictured, file: GGUFFile) -> tuple[Floats, Floats]:
    """A picture's embeddings [tokens, d] by the checkpoint, and by the projector file alone."""
    vision = model.towers.vision
    reference = torch_towers.checkpoint_weights(model.checkpoint, model.towers.specs, vision)
    pictures = torch_towers.exact_pictures(vision, torch_towers.synthetic_picture(vision))
    sides = ((reference, vision), open_projector(file))
    wanted, found = (torch_towers.embed(torch_towers.load_towers(*side), pictures)[0] for side in sides)
    return wanted, found


def check_embeddings(wanted: Floats, found: Floats, quant: str) -> Check:
    """Relative error, cosine of the worst token and largest difference, against the type's limit."""
    error = torch_towers.embedding_error(wanted, found)
    limit = IMAGE_LIMITS.get(quant, IMAGE_LIMITS["f16"])
    detail = (
        f"embeddings of a picture: relative error {error.relative:.2g}, limit {limit:g}; worst token's "
        f"cosine {error.cosine:.7f}; max abs {error.max_abs:.2g}"
    )
    return Check("images", error.relative <= limit, detail, error.relative)


def check_question(model: Pictured, text: GGUFFile, limit: float, both: tuple[Floats, Floats]) -> Check:
    """Logits of a question about the picture: the files against the checkpoint, each with its embeddings."""
    towers, tokenizer = model.towers, model.tokenizer
    prompt = question("What is this?", towers.token, towers.dialogue)
    ids, _ = tokens(tokenizer.tokenizer, prompt, tokenizer.source)
    at = ids.index(towers.token_id)
    before = ids[:at] if tokenizer.first_id is None else [tokenizer.first_id, *ids[:at]]
    source, plain = language_model(model.checkpoint, model.config)
    written = open_model(text)
    base, candidate = (
        picture_prompt.prompt_logits(weights, numbers, [before, embedded, ids[at + 1 :]])
        for weights, numbers, embedded in ((source, plain, both[0]), (written, written.config, both[1]))
    )
    kld = float(picture_prompt.divergence(base, candidate).mean())
    detail = f"a question about a picture: mean KLD {kld:.3g} over {len(base)} positions, limit {limit:g}"
    return Check("question", kld <= limit, detail, kld)


def limit_of(quant: str, projector: str) -> float:
    """The mean KL divergence that the text file's and the projector's types may bring together."""
    return max(thresholds.thresholds_for(name).max_kld for name in (quant, projector))


def prove_pair(
    model: Pictured,
    projector: GGUFFile,
    texts: Sequence[tuple[GGUFFile, float]] = (),
    *,
    mode: Mode = "full",
    as_planned: bool = True,
) -> Iterator[Event]:
    """Prove a projector against its checkpoint, and with each of `texts`, its text files, the pair.

    Its tensors, `as_planned` by a conversion; complete for a runtime, its weights, each text file's pairing;
    then the embeddings of a picture, and a question about it to each text file, whose mean KL divergence may
    be the number that comes with it. A "quick" proof computes none with big towers. Raises CheckpointError
    when the projector is of another model.
    """
    yield check_structure(model, projector, as_planned)
    found = list(completeness(projector))
    yield from found
    if any(check.name in READABLE and not check.passed for check in found):
        return
    same_towers(model, projector)
    yield from check_weights(model.checkpoint, projector, model.towers.specs)
    for text, _ in texts:
        faults = pair_faults(text, projector)
        yield Check("pair", not faults, "; ".join(faults) or f"belongs to {text.path.name}")
    if not runs_towers(model.towers, mode):
        yield Step("image embeddings were not compared; --effort full does it")
        return
    yield Step("computing the embeddings of a picture twice")
    both = embeddings(model, projector)
    yield check_embeddings(*both, projector_quant(projector))
    for text, limit in texts:
        yield check_question(model, text, limit, both)


def runs_towers(towers: Towers, mode: str) -> bool:
    """Whether a proof of this effort computes the embeddings of a picture."""
    return mode == "full" or sum(prod(spec.shape) for spec in towers.specs) <= QUICK_PARAMETERS


def check_libraries(towers: Towers, mode: str, instead: str = "") -> None:
    """Raises MissingLibrary where the proof of a projector would need torch, and that is not installed."""
    if runs_towers(towers, mode):
        need(*TORCH, what="the proof of the projector", instead=instead)


def check_structure(model: Pictured, projector: GGUFFile, as_planned: bool) -> Check:
    """Names and shapes are those of the checkpoint's towers."""
    wanted = {(spec.gguf, spec.shape) for spec in model.towers.specs}
    differing = wanted ^ {(tensor.name, tensor.shape) for tensor in projector.tensors.values()}
    detail = f"{len(projector.tensors)} tensors, {len(projector.typed)} keys"
    if differing:
        detail = f"{len(differing)} tensors are not the towers', the first is {min(differing)[0]}"
    elif not as_planned:
        detail = "tensors are not of the types that were planned"
    return Check("structure", as_planned and not differing, detail, len(differing))


def same_towers(model: Pictured, projector: GGUFFile) -> None:
    """Raises CheckpointError when a projector's tensors and pictures cannot be those of the checkpoint."""
    ours, theirs = model.towers.vision, stored_vision(projector)
    wanted = {spec.gguf: str(list(spec.shape)) for spec in model.towers.specs}
    found = {name: str(list(tensor.shape)) for name, tensor in projector.tensors.items()}
    for sizes, vision in ((wanted, ours), (found, theirs)):
        for name, tower in (("SigLIP", vision.vit), ("SAM", vision.sam)):
            sizes[f"the side of {name}'s picture"] = str(tower.image_size) if tower is not None else "none"
    for name in (*wanted, *found):
        a, b = wanted.get(name, "none"), found.get(name, "none")
        if a != b:
            raise CheckpointError(
                "the projector and the checkpoint are not of the same model",
                where=projector.path,
                why=f"{name} is {b}, the checkpoint has {a}",
                hint="Give the checkpoint that the projector was made from",
            )


def of_projector(events: Iterable[Event]) -> Iterator[Event]:
    """The same events, with "mmproj" before the name of each check, as beside those of a text file."""
    for event in events:
        yield replace(event, name="mmproj " + event.name) if isinstance(event, Check) else event
