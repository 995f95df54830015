"""Janus-Pro, 1B and 7B: DeepSeek-VL 1.3B's tower and aligner, a Llama decoder, and parts that make pictures.

What makes pictures is left out of GGUF files: no runtime of them makes any. Sources: janus/models of the
original code, whose layout is that of DeepSeek-VL, and transformers' janus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsconvert.errors import CheckpointError
from dsconvert.models import towers
from dsconvert.models.architecture import Mount, mounted
from dsconvert.models.architectures import deepseek_vl as vl
from dsconvert.models.architectures.llama import LLAMA
from dsconvert.models.tensor_table import Table
from dsconvert.models.towers import Part, TowerModel

JANUS = "JanusForConditionalGeneration"
ROWS = (
    *towers.siglip(
        "model.vision_model.",
        towers.TRANSFORMERS_SIGLIP | {"out": "self_attn.projection_layer"},
        fused=False,
    ),
    *towers.aligner("model.aligner.fc1", "model.aligner.hidden_layers.0"),
)
GENERATING = (
    r"gen_(vision_model|aligner|head|embed)\..*",
    r"model\.(vqmodel|generation_(embeddings|aligner|head))\..*",
)
_VISION_PART = r"model\.(vision_model|aligner|vqmodel|generation_\w+)\..*"


CODEBOOK = r"gen_vision_model\.quantize\.codebook_used"  # a count, which training kept
# From the names of the original code to transformers' for what makes pictures.
RENAMES = (
    (r"(vision_model\.decoder)\.conv_blocks", r"\1.up"),
    (r"(vision_model\.encoder)\.conv_blocks", r"\1.down"),
    (r"\.res\.", ".block."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"^gen_vision_model", "model.vqmodel"),
    (r"^gen_aligner\.layers\.0", "model.generation_aligner.fc1"),
    (r"^gen_aligner\.layers\.2", "model.generation_aligner.hidden_layers.0"),
    (r"^gen_head\.output_mlp_projector", "model.generation_head.proj_out"),
    (r"^gen_head", "model.generation_head"),
    (r"^gen_embed", "model.generation_embeddings"),
)


def configs(low: Part, high: Part, width: int) -> dict[str, Part]:
    part = {key: value for key, value in low.items() if key != "intermediate_size"}
    ratio = low["intermediate_size"] / low["hidden_size"]
    part |= {"mlp_ratio": ratio, "projection_dim": width, "depth": 2, "model_type": "janus_vision_model"}
    part["num_image_tokens"] = (low["image_size"] // low["patch_size"]) ** 2
    return {"vision_config": part}


def making(raw: Mapping[str, Any]) -> dict[str, Part]:
    """The config of what makes pictures, from an original one; CheckpointError where it says nothing."""
    sizes = {
        "embed_dim": ("gen_vision_config", "n_embed"),
        "num_embeddings": ("gen_vision_config", "image_token_size"),
        "projection_dim": ("gen_aligner_config", "n_embed"),
        "num_hidden_layers": ("gen_aligner_config", "depth"),
        "image_token_embed_dim": ("gen_head_config", "image_token_embed"),
    }
    found: Part = {"model_type": "janus_vqgan"}
    for name, (part, key) in sizes.items():
        params = raw[part].get("params") if isinstance(raw.get(part), dict) else None
        found[name] = params.get(key) if isinstance(params, dict) else None
        if not isinstance(found[name], int):
            raise CheckpointError(
                f"{part!r} cannot be used",
                where="config.json",
                why=f"its params state no {key}",
                hint="--language-only converts the decoder alone",
            )
    return {"vq_config": found}


def torch_model(config: Part) -> Any:
    """Without the parts that make pictures, of which the smallest are made to be taken out."""
    from transformers import JanusConfig, JanusModel

    small = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
    model = JanusModel(JanusConfig(**config, vq_config=small))
    for part in ("vqmodel", "generation_embeddings", "generation_aligner", "generation_head"):
        setattr(model, part, None)
    return model


TOWERS = (
    TowerModel(
        hf_class=JANUS,
        projector="janus_pro",
        tables={
            vl.ORIGINAL: Table(
                vl.ORIGINAL_VL_ROWS, (*vl.POOLING, *GENERATING, vl.LANGUAGE_PART[vl.ORIGINAL])
            ),
            JANUS: Table(ROWS, (*GENERATING, vl.LANGUAGE_PART[vl.VL])),
        },
        claims=vl.makes_pictures,
        kinds={"vision_config": "janus_vision_model"},
        configs=configs,
        torch_model=torch_model,
        unused=(*vl.POOLING, CODEBOOK),
        generating=GENERATING,
        renames=RENAMES,
        making=making,
        roles=("<|User|>", "<|Assistant|>"),
        around=("<begin_of_image>", "<end_of_image>"),
    ),
)
ARCHITECTURES = (
    mounted(
        LLAMA,
        JANUS,
        "janus",
        Mount(LLAMA, "text_config", vl.inside, tied_outside=True),
        words="JanusModel",
        drop=(_VISION_PART,),
        beside=vl.every_spelling(ROWS),
    ),
)
