"""Proof of a projector and its text file on a picture: embeddings, and a question about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from converters.gguf.mmproj import IMAGE_LIMITS, open_projector
from converters.gguf.mmproj_check import completeness, pair_faults
from converters.gguf.parse import GGUFFile, open_gguf
from converters.gguf.reader import open_model
from converters.gguf.towers import Towers, plan_towers
from dsconvert import thresholds, vision_forward, vision_runner
from dsconvert.checkpoint import Checkpoint, open_checkpoint
from dsconvert.config import ModelConfig, load_config
from dsconvert.errors import UsageError
from dsconvert.events import Check, Event, Step
from dsconvert.inner import language_model
from dsconvert.vision_runner import Floats
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.vision_template import SYSTEM


def projector_quant(file: GGUFFile) -> str:
    """The type of a projector's matrices."""
    return file.tensors["v.blk.0.ffn_up.weight"].qtype.name


def embeddings(checkpoint: Checkpoint, towers: Towers, file: GGUFFile) -> tuple[Floats, Floats]:
    """A picture's embeddings [tokens, d] by the checkpoint, and by the projector file alone."""
    reference = vision_runner.checkpoint_weights(checkpoint, towers.specs, towers.vision)
    pictures = vision_runner.exact_pictures(towers.vision, vision_runner.synthetic_picture(towers.vision))
    sides = ((reference, towers.vision), open_projector(file))
    wanted, found = (vision_runner.embed(vision_runner.load_towers(*side), pictures)[0] for side in sides)
    return wanted, found


def check_embeddings(wanted: Floats, found: Floats, quant: str) -> Check:
    """Relative error, cosine of the worst token and largest difference, against the type's limit."""
    error = vision_runner.embedding_error(wanted, found)
    limit = IMAGE_LIMITS.get(quant, IMAGE_LIMITS["f16"])
    detail = (
        f"relative error {error.relative:.2g}, limit {limit:g}; worst token's cosine {error.cosine:.7f}; "
        f"max abs {error.max_abs:.2g}"
    )
    return Check("images", error.relative <= limit, detail, error.relative)


def check_question(
    checkpoint: Checkpoint,
    config: ModelConfig,
    tokenizer: TokenizerData,
    towers: Towers,
    text: GGUFFile,
    limit: float,
    both: tuple[Floats, Floats],
) -> Check:
    """Logits of a question about the picture: the files against the checkpoint, each with its embeddings."""
    prompt = f"{SYSTEM}\n\nUser: {towers.token}What is this?\n\nAssistant:"
    ids = tokenizer.tokenizer.encode(prompt, add_special_tokens=False).ids
    at = ids.index(towers.token_id)
    before = ids[:at] if tokenizer.first_id is None else [tokenizer.first_id, *ids[:at]]
    source, plain = language_model(checkpoint, config)
    model = open_model(text)
    base, candidate = (
        vision_forward.prompt_logits(weights, numbers, [before, embedded, ids[at + 1 :]])
        for weights, numbers, embedded in ((source, plain, both[0]), (model, model.config, both[1]))
    )
    kld = float(vision_forward.divergence(base, candidate).mean())
    detail = f"mean KLD {kld:.3g} over {len(base)} positions, limit {limit:g}"
    return Check("question", kld <= limit, detail, kld)


def limit_of(quant: str, projector: str) -> float:
    """The mean KL divergence that the text file's and the projector's types may bring together."""
    return max(thresholds.thresholds_for(name).max_kld for name in (quant, projector))


def prove_projector(model: str, path: Path, text: Path | None = None, quant: str = "") -> Iterator[Event]:
    """Prove a projector file against the checkpoint `model`, and with `text`, its text file, the pair.

    Complete for a runtime, the embeddings of a picture, and with the text file a question about it; `quant`
    is the text file's type. Raises ConversionError when something cannot be compared at all.
    """
    checkpoint = open_checkpoint(model)
    config = load_config(checkpoint.folder)
    tokenizer = load_tokenizer(checkpoint.folder, config.vocab_size)
    towers = plan_towers(checkpoint, config, tokenizer)
    if towers is None:
        raise UsageError("the checkpoint has no vision tower", where=checkpoint.folder)
    file = open_gguf(path)
    found = list(completeness(file))
    yield from found
    if not all(check.passed for check in found):
        return  # an incomplete file gives no embeddings
    yield Step("computing the embeddings of a picture twice")
    both = embeddings(checkpoint, towers, file)
    yield check_embeddings(*both, projector_quant(file))
    if text is not None:
        written = open_gguf(text)
        faults = pair_faults(written, file)
        yield Check("pair", not faults, "; ".join(faults) or "pair")
        limit = limit_of(quant, projector_quant(file))
        yield check_question(checkpoint, config, tokenizer, towers, written, limit, both)
