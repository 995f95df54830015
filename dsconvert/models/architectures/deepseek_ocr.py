"""DeepSeek-OCR and OCR-2: SAM, a second transformer on what it gives, one linear, a small DeepSeek decoder.

The decoder has Llama's attention and DeepSeek's experts. Sources: the code that comes with the models,
transformers' unlimited_ocr, whose towers are those of the first, and deepseek_ocr2; llama.cpp's converter and
its deepseekocr graphs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dsconvert.models import towers
from dsconvert.models.architecture import Keys, Mount, mounted, unwritable, usual_keys
from dsconvert.models.architectures import deepseek, qwen2
from dsconvert.models.experts import Experts, mlp_rows
from dsconvert.models.tensor_table import DROP, Table
from dsconvert.models.towers import NUMBERS, WORDS, Part, TowerModel
from dsconvert.models.values import Values

if TYPE_CHECKING:
    from dsconvert.models.config import ModelConfig

OCR, OCR2, OCR2_LIBRARY = (
    "DeepseekOCRForCausalLM",
    "DeepseekOCR2ForCausalLM",
    "DeepseekOcr2ForConditionalGeneration",
)
THETA = 10000.0  # of RoPE, which files of this architecture state only where it is another
_DEEPSEEK = deepseek.ARCHITECTURES[0]


def read_experts(get: Values) -> Experts:
    """transformers' configs name the layers with experts instead of counting those before."""
    types = get.raw.get("mlp_layer_types")
    if types is None:
        return deepseek.read_experts(get)
    if not isinstance(types, list) or sorted(types) != types or not {*types} <= {"dense", "sparse"}:
        raise get.wrong("mlp_layer_types", 'is not some layers "dense" and the rest "sparse"')
    return deepseek.read_experts(get.over({"first_k_dense_replace": types.count("dense")}))


def check(get: Values) -> None:
    """Plain attention, and experts chosen by their scores alone."""
    usual_values = {"use_mla": False, "topk_method": "greedy", "routed_scaling_factor": 1.0, "n_group": 1}
    for key, usual in usual_values.items():
        if get.raw.get(key) not in (None, usual):
            raise get.wrong(key, f"is {str(get.raw[key])[:40]}, and this decoder has {usual}")
    deepseek.check(get)


def gguf_keys(config: ModelConfig) -> Keys:
    """As llama.cpp's converter writes them; raises CheckpointError for a config that its graph cannot run."""
    experts, usual = config.experts, usual_keys(config)
    assert experts is not None  # this layout has them
    if experts.normalised:
        raise unwritable("norm_topk_prob true", "transformers ignores it here, and llama.cpp would not")
    if config.kv_heads != config.heads:
        raise unwritable("num_key_value_heads", "llama.cpp's graph has as many heads of keys as of queries")
    if config.rope_theta == THETA:
        del usual["rope.freq_base"]
    return {
        **usual,
        "expert_count": ("uint32", experts.count),
        "expert_used_count": ("uint32", experts.used),
        "expert_group_count": ("uint32", 1),
        "expert_group_used_count": ("uint32", 1),
        "leading_dense_block_count": ("uint32", experts.first),
        "vocab_size": ("uint32", config.vocab_size),
        "expert_feed_forward_length": ("uint32", experts.size),
        "expert_shared_count": ("uint32", experts.shared),
        "rope.dimension_count": ("uint32", config.head_dim),
    }


TEXT = replace(
    _DEEPSEEK,
    hf_class="DeepseekOcr2TextModel",
    model_type="deepseek_ocr2_text",
    gguf="deepseek2-ocr",
    mlx=False,
    table=Table((*(row for row in qwen2.WEIGHTS if ".mlp." not in row.hf), *mlp_rows()), DROP),
    defaults=_DEEPSEEK.defaults,
    check=check,
    gguf_keys=gguf_keys,
    words="",
    experts=read_experts,
)


# The names on disk, which transformers keeps, and those of its modules.
_DISK_SAM = (
    *towers.sam("model.sam_model.", "patch_embed.proj", "blocks.{i}.", "norm"),
    *towers.neck("model.sam_model.neck", "v.sam.neck", NUMBERS),
    *towers.downsampling("model.sam_model.net_2", "model.sam_model.net_3"),
)
_AT = "model.vision_tower."
_SAM = (
    *towers.sam(_AT + "sam_encoder.", "patch_embed.projection", "layers.{i}.", "layer_norm"),
    *towers.neck(_AT + "sam_encoder.neck", "v.sam.neck", WORDS),
    *towers.downsampling(_AT + "sam_encoder.proj.conv1", _AT + "sam_encoder.proj.conv2"),
)
DISK = (
    *_DISK_SAM,
    *towers.clip("model.vision_model.", "transformer.layers.{i}.", "self_attn.qkv_proj"),
    *towers.ends("model.projector.layers", "ce", "model.view_seperator", newline=True),
)
MODULES = (
    *_SAM,
    *towers.clip(_AT + "vision_encoder.", "encoder.layers.{i}.", ""),
    *towers.ends("model.multi_modal_projector", "ce", "model.view_separator", newline=True),
)
DISK_2 = (
    *_DISK_SAM,
    *towers.queried("model.qwen2_model.model.model.", "model.qwen2_model.query_{}"),
    *towers.ends("model.projector.layers", "c", "model.view_seperator", newline=False),
)
MODULES_2 = (
    *_SAM,
    *towers.queried(_AT + "vision_encoder.", _AT + "query_{}_resolution"),
    *towers.ends("model.multi_modal_projector", "c", "model.view_separator", newline=False),
)
UNUSED = (r"model\.vision_model\.embeddings\.patch_embedding\.weight",)
_LANGUAGE_PART = r"model\.(embed_tokens|layers|norm)\..*|lm_head\.weight"
_VISION_PART = (
    r"model\.(sam_model|vision_model|qwen2_model|projector)\..*|model\.(image_newline|view_seperator)"
)


def _sam_config(high: Part, kind: str) -> Part:
    channels = high["output_channels"]
    reduced = {"downsample_channels": [2 * channels, 4 * channels]}
    return {**reduced, **high, "model_type": f"{kind}_sam_vision_model"}


def configs(low: Part, high: Part, width: int) -> dict[str, Part]:
    encoder = {**low, "hidden_act": "quick_gelu"}
    return {"vision_config": {"sam_config": _sam_config(high, "unlimited_ocr"), "encoder_config": encoder}}


def configs_2(low: Part, high: Part, width: int) -> dict[str, Part]:
    encoder = {key: value for key, value in low.items() if key not in ("image_size", "patch_size")}
    encoder |= {"hidden_act": "silu", "rms_norm_eps": encoder.pop("layer_norm_eps"), "vocab_size": 1}
    encoder["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6}
    return {"vision_config": {"sam_config": _sam_config(high, "deepseek_ocr2"), "encoder_config": encoder}}


def torch_model(config: Part) -> Any:
    from transformers import UnlimitedOcrConfig, UnlimitedOcrModel

    return UnlimitedOcrModel(UnlimitedOcrConfig(**config))


def torch_model_2(config: Part) -> Any:
    """Its RoPE is computed and in no checkpoint, so it is made where it can be."""
    import torch
    from transformers import DeepseekOcr2Config, DeepseekOcr2Model
    from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2 as classes

    text = {**config["text_config"], "mlp_layer_types": ["dense"]}
    model = DeepseekOcr2Model(DeepseekOcr2Config(**{**config, "text_config": text}))
    encoder = model.vision_tower.vision_encoder
    with torch.device("cpu"):
        encoder.rotary_emb = classes.DeepseekOcr2VisionRotaryEmbedding(encoder.config)
    return model


TOWERS = (
    TowerModel(
        hf_class="UnlimitedOcrModel",
        projector="deepseekocr",
        tables={OCR: Table(DISK, (*UNUSED, *DROP, _LANGUAGE_PART)), "UnlimitedOcrModel": Table(MODULES)},
        claims=lambda raw: True,
        kinds={"clip-l-14-224": "clip", "sam_vit_b": "sam"},
        configs=configs,
        torch_model=torch_model,
        unused=UNUSED,
        roles=("", ""),
        chained=True,
        positions=lambda vision: vision.vit.grid**2 + 1,
        tokens=lambda vision: vision.sam.reduced_grid * (vision.sam.reduced_grid + 1) + 1,
    ),
    TowerModel(
        hf_class="DeepseekOcr2Model",
        projector="deepseekocr2",
        tables={
            OCR2: Table(DISK_2, (*DROP, _LANGUAGE_PART)),
            OCR2_LIBRARY: Table(DISK_2, (*DROP, _LANGUAGE_PART)),
            "DeepseekOcr2Model": Table(MODULES_2),
        },
        claims=lambda raw: True,
        kinds={"qwen2-0-5b": "queried", "sam_vit_b": "sam"},
        configs=configs_2,
        torch_model=torch_model_2,
        roles=("", ""),
        chained=True,
        tokens=lambda vision: vision.sam.reduced_grid**2 + 1,
    ),
)
ARCHITECTURES = (
    TEXT,
    *(
        mounted(
            TEXT,
            name,
            model_type,
            Mount(TEXT, key, lambda name: name, tied_outside=False, also=("deepseek_v2",)),
            drop=(_VISION_PART,),
            beside=(rows,),
        )
        for name, model_type, key, rows in (
            (OCR, "deepseek_vl_v2", "language_config", DISK),
            (OCR2, "deepseek_vl_v2", "language_config", DISK_2),
            (OCR2_LIBRARY, "deepseek_ocr2", "text_config", DISK_2),
        )
    ),
)
