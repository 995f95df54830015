"""Image embeddings and prompts with pictures: transformers against the projector file and llama.cpp.

The reference is transformers' own DeepSeek-VL on the checkpoint. The tests on full-shape towers and real
photographs are slow; they need scikit-image, and say so where it is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_vl
from tiny_vl import IMAGE, VL

from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from converters.gguf.projector import keys as projector_keys
from dsconvert.errors import ConversionError, PlanError, UsageError
from dsconvert.runtimes.llamacpp import Engine
from dsconvert.runtimes.mtmd import Projector
from dsconvert.vision import torch_towers as runner
from dsconvert.vision.config import VisionConfig
from tokenizer_tools.chat_template import render

Floats = npt.NDArray[np.float32]
SIZES = pytest.mark.parametrize("hybrid", [False, True], ids=["1.3B", "7B"])
QUANTS = pytest.mark.parametrize("quant", ["f32", "f16", "bf16", "q8_0"])
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


@dataclass(frozen=True)
class Model:
    """A checkpoint, its text file, and where its projectors are."""

    folder: Path
    text: Path
    o: VL

    def projector(self, quant: str) -> Path:
        """The projector file of a type, made when it is asked for."""
        path = self.text.with_name(f"mmproj-{quant}.gguf")
        if not path.exists():
            asked = {"force": True, "effort": "off", "mmproj": path, "mmproj_quant": quant}
            list(convert(Options(str(self.folder), ("f16",), self.text, **asked)))
        return path


@functools.cache
def reference(folder: Path) -> Any:
    """transformers' model in float32."""
    import torch
    import transformers
    from transformers import AutoConfig

    transformers.logging.set_verbosity_error()  # it warns that the untied head is untied
    transformers.logging.disable_progress_bar()
    name = AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()


def reference_embeddings(folder: Path, pictures: runner.Pictures) -> Floats:
    import torch

    pixels = [torch.from_numpy(x) for x in (pictures.low, pictures.high) if x is not None]
    with torch.no_grad():
        features = reference(folder).model.get_image_features(*pixels, return_dict=True)
    return np.asarray(features.pooler_output.numpy())


def reference_logits(folder: Path, ids: list[int], pictures: runner.Pictures) -> Any:
    """float64 [n, vocabulary] of ids that hold the image token once for each embedding."""
    import torch

    pixels = {"pixel_values": torch.from_numpy(pictures.low)}
    if pictures.high is not None:
        pixels["high_res_pixel_values"] = torch.from_numpy(pictures.high)
    with torch.no_grad():
        return reference(folder)(input_ids=torch.tensor([ids]), **pixels).logits[0].double()


def divergence(wanted: Any, found: Floats) -> float:
    """The largest KL divergence over all positions."""
    import torch

    p, q = wanted.log_softmax(-1), torch.from_numpy(found).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


def file_towers(path: Path) -> tuple[Any, VisionConfig]:
    """The towers built from a projector file and nothing else."""
    weights, vision = projector_keys.open_projector(open_gguf(path))
    return runner.load_towers(weights, vision), vision


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Model]:
    made = {}
    for hybrid in (False, True):
        root, o = tmp_path_factory.mktemp("vl"), VL(hybrid=hybrid, layers=2, dtype="f32")
        made[hybrid] = Model(tiny_vl.vl_checkpoint(root / "m", o), root / "text.gguf", o)
    return made


@SIZES
@QUANTS
def test_embeddings_from_the_file_alone(hybrid: bool, quant: str, models: dict[bool, Model]) -> None:
    towers, vision = file_towers(models[hybrid].projector(quant))
    pictures = runner.exact_pictures(vision, runner.synthetic_picture(vision))
    wanted, found = reference_embeddings(models[hybrid].folder, pictures), runner.embed(towers, pictures)
    assert found.shape == (1, models[hybrid].o.tokens, models[hybrid].o.d)
    error = runner.embedding_error(wanted, found)
    if quant == "f32":
        assert np.array_equal(found, wanted)
    else:
        assert 0 < error.relative < projector_keys.IMAGE_LIMITS[quant]


@SIZES
def test_every_tower_tensor_matters(hybrid: bool, models: dict[bool, Model]) -> None:
    """Zeroing any of the file's tensors moves the embeddings by more than the limit of f16."""
    file = open_gguf(models[hybrid].projector("f32"))
    vision = projector_keys.stored_vision(file)
    pictures = runner.exact_pictures(vision, runner.synthetic_picture(vision))
    right = runner.embed(runner.load_towers(lambda name: file.tensors[name].float32(), vision), pictures)
    for zeroed in file.tensors:
        if zeroed.endswith("attn_k.bias"):
            continue  # it adds the same to all scores of a query, which softmax does not see

        def weights(name: str, zeroed: str = zeroed) -> Floats:
            values = file.tensors[name].float32()
            return np.zeros_like(values) if name == zeroed else values

        error = runner.embedding_error(right, runner.embed(runner.load_towers(weights, vision), pictures))
        assert error.relative > 1e-3, zeroed


def test_a_missing_tensor_is_an_error(models: dict[bool, Model]) -> None:
    file = open_gguf(models[False].projector("f32"))
    tensors = {name: tensor for name, tensor in file.tensors.items() if name != "v.post_ln.bias"}
    with pytest.raises(PlanError, match=r"1 missing: 'v\.post_ln\.bias'"):
        projector_keys.open_projector(replace(file, tensors=tensors))


def test_pictures_of_another_size_are_refused(models: dict[bool, Model]) -> None:
    _, vision = file_towers(models[False].projector("f32"))
    with pytest.raises(UsageError, match="pictures of shape"):
        runner.exact_pictures(vision, np.zeros((1, 65, 64, 3), np.uint8))


@pytest.mark.parametrize(("quant", "limit"), [("f32", 2e-3), ("f16", 2e-3), ("bf16", 1e-2), ("q8_0", 4e-2)])
def test_llamacpp_agrees_on_the_embeddings(quant: str, limit: float, models: dict[bool, Model]) -> None:
    path = models[False].projector(quant)
    vision = projector_keys.stored_vision(open_gguf(path))
    picture = runner.synthetic_picture(vision)
    wanted = reference_embeddings(models[False].folder, runner.exact_pictures(vision, picture))[0]
    with Engine(models[False].text, n_ctx=64) as engine, Projector(path, engine) as projector:
        found = projector.embed(picture[0])
    assert runner.embedding_error(wanted, found).worst_relative < limit


def test_a_prompt_with_a_picture_in_llamacpp(models: dict[bool, Model]) -> None:
    """Chat template, token ids, embeddings and logits: image and question as transformers has them."""
    model = models[False]
    path = model.projector("f32")
    file, text = open_gguf(path), open_gguf(model.text)
    vision = projector_keys.stored_vision(file)
    prompt = render(text.keys["tokenizer.chat_template"], QUESTION, eos_token=tiny_vl.tiny.EOS)
    assert prompt.count(IMAGE) == 1
    picture = runner.synthetic_picture(vision)
    with Engine(model.text, n_ctx=512) as engine, Projector(path, engine) as projector:
        parts = projector.parts(prompt.replace(IMAGE, projector.marker), [picture[0]])
        found = engine.logits(*parts)
    assert [len(part) for part in parts][1] == vision.tokens
    before, _, after = parts
    image = file.keys["dsconvert.image.token_id"]
    ids = [*before, *[image] * vision.tokens, *after]
    # The same ids as the checkpoint's tokenizer gives for the prompt, with BOS.
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(model.folder / "tokenizer.json"))
    plain = own.encode(prompt, add_special_tokens=False).ids
    at = plain.index(image)
    bos = own.token_to_id(tiny_vl.tiny.BOS)
    assert ids == [bos, *plain[:at], *[image] * vision.tokens, *plain[at + 1 :]]
    pictures = runner.exact_pictures(vision, picture)
    assert divergence(reference_logits(model.folder, ids, pictures), found) < 1e-3


def test_embeddings_handed_to_llamacpp(models: dict[bool, Model]) -> None:
    """What DeepSeek-VL 7B needs: our embeddings, from the file alone, as llama_batch.embd."""
    model = models[True]
    towers, vision = file_towers(model.projector("f16"))
    pictures = runner.exact_pictures(vision, runner.synthetic_picture(vision))
    image = open_gguf(model.projector("f16")).keys["dsconvert.image.token_id"]
    before, after = [3, 70, 71, 72], [80, 81, 82]
    with Engine(model.text, n_ctx=256) as engine:
        found = engine.logits(before, runner.embed(towers, pictures)[0], after)
    wanted = reference_logits(model.folder, [*before, *[image] * vision.tokens, *after], pictures)
    assert divergence(wanted, found) < 1e-3


def test_llamacpp_refuses_the_hybrid_cleanly(models: dict[bool, Model]) -> None:
    model = models[True]
    with (
        Engine(model.text, n_ctx=64) as engine,
        pytest.raises(ConversionError, match="unknown projector type: deepseek_vl_hybrid"),
    ):
        Projector(model.projector("f16"), engine)


def test_llamacpp_refuses_a_projector_of_another_width(models: dict[bool, Model], tmp_path: Path) -> None:
    o = VL(d=128)
    list(
        convert(
            Options(
                str(tiny_vl.vl_checkpoint(tmp_path / "m", o)), ("f16",), tmp_path / "x.gguf", effort="off"
            )
        )
    )
    with Engine(models[False].text, n_ctx=64) as engine, pytest.raises(ConversionError):
        Projector(tmp_path / "mmproj-x.gguf", engine)


# Full-shape towers, real photographs.


def photographs(side: int, count: int) -> npt.NDArray[np.uint8]:
    """Square middles of scikit-image's photographs, cut; enlarged by a whole number where too small."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image for real photographs")
    found = []
    for name in ("astronaut", "coffee", "rocket")[:count]:
        picture = getattr(data, name)()[..., :3]
        factor = -(-side // min(picture.shape[:2]))
        picture = picture.repeat(factor, 0).repeat(factor, 1)
        top, left = ((size - side) // 2 for size in picture.shape[:2])
        found.append(picture[top : top + side, left : left + side])
    return np.stack(found)


@pytest.mark.parametrize(
    ("name", "limit"), [("astronaut", 2e-3), ("coffee", 2e-3), ("chelsea", 0.2), ("rocket", 0.2)]
)
def test_preprocessing_apart(name: str, limit: float, tmp_path: Path) -> None:
    """llama.cpp resizes and pads as transformers does where the sides come out whole; else a row differs."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image for real photographs")
    from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil

    folder = tiny_vl.vl_checkpoint(tmp_path / "m", VL(image=96, dtype="f32"))
    list(convert(Options(str(folder), ("f16",), tmp_path / "x.gguf", effort="off", mmproj_quant="f32")))
    towers, vision = file_towers(tmp_path / "mmproj-x.gguf")
    photo = np.ascontiguousarray(getattr(data, name)()[..., :3])
    half = [0.5, 0.5, 0.5]
    processor = DeepseekVLImageProcessorPil(size={"height": 96, "width": 96}, image_mean=half, image_std=half)
    pixels = np.asarray(processor(photo, return_tensors="np")["pixel_values"], np.float32)
    path = tmp_path / "mmproj-x.gguf"
    with Engine(tmp_path / "x.gguf", n_ctx=64) as engine, Projector(path, engine) as projector:
        found = projector.embed(photo)
    wanted = runner.embed(towers, runner.Pictures(pixels))[0]
    assert runner.embedding_error(wanted, found).relative < limit
    assert vision.processor.pad == tuple(processor.background_color)


@pytest.fixture(scope="module")
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    hybrid = bool(request.param)
    root, o = tmp_path_factory.mktemp("full"), tiny_vl.full(hybrid=hybrid, dtype="f32")
    yield Model(tiny_vl.vl_checkpoint(root / "m", o), root / "text.gguf", o)
    reference.cache_clear()
    for path in (*root.glob("*.gguf"), root / "m" / "model.safetensors"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("full", [False], indirect=True, ids=["1.3B"])
def test_full_shape_in_llamacpp_on_photographs(full: Model) -> None:
    path = full.projector("f16")
    vision = projector_keys.stored_vision(open_gguf(path))
    photos = photographs(384, 3)
    wanted = reference_embeddings(full.folder, runner.exact_pictures(vision, photos))
    with Engine(full.text, n_ctx=1024) as engine, Projector(path, engine) as projector:
        for picture, embeddings in zip(photos, wanted, strict=True):
            error = runner.embedding_error(embeddings, projector.embed(picture))
            assert error.relative < 2e-3
            assert error.worst_relative < 2e-3
            assert error.cosine > 0.99999
        parts = projector.parts(f"User: {projector.marker}What is this?\n\nAssistant:", [photos[0]])
        found = engine.logits(*parts)
    image = open_gguf(path).keys["dsconvert.image.token_id"]
    ids = [i for part in parts for i in (part if isinstance(part, list) else [image] * len(part))]
    pictures = runner.exact_pictures(vision, photos[:1])
    assert divergence(reference_logits(full.folder, ids, pictures), found) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("full", [True], indirect=True, ids=["7B"])
def test_full_shape_hybrid_from_the_file_alone(full: Model) -> None:
    photos = photographs(1024, 1)
    pictures = runner.exact_pictures(file_towers(full.projector("f32"))[1], photos)
    wanted = reference_embeddings(full.folder, pictures)
    for quant in ("f32", "f16"):
        towers, vision = file_towers(full.projector(quant))
        found = runner.embed(towers, pictures)
        if quant == "f32":
            assert np.array_equal(found, wanted)
        assert runner.embedding_error(wanted, found).relative < 1e-3
    image = open_gguf(full.projector("f16")).keys["dsconvert.image.token_id"]
    before, after = [3, 70, 71, 72], [80, 81, 82]
    with Engine(full.text, n_ctx=1024) as engine:
        logits = engine.logits(before, found[0], after)
    wanted = reference_logits(full.folder, [*before, *[image] * vision.tokens, *after], pictures)
    assert divergence(wanted, logits) < 1e-3
