"""The bytes that a model's weights take in every type that formats of folders have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod

from converters.compressed.pack import stored_shapes as compressed_shapes
from converters.compressed.schemes import SCHEMES, Row
from converters.compressed.shapes import check_floats
from converters.compressed.shapes import check_shapes as check_integers
from converters.exl2.settings import HEADS, bits_of, groups_for
from converters.exl2.shapes import check_shapes as check_exl2
from converters.gptq.pack import stored_shapes
from converters.gptq.shapes import Layout
from converters.gptq.shapes import check_shapes as check_gptq
from converters.mlx.affine import BITS as MLX_BITS
from converters.mlx.affine import Affine
from converters.mlx.pack import stored_shapes as mlx_shapes
from converters.mlx.plan import SPLIT
from converters.mlx.shapes import check_shapes as check_mlx
from dsconvert.checkpoints.safetensors_header import BITS
from dsconvert.errors import QuantizationError
from dsconvert.memory.model import Made, weights_of
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import SOLVE_ORDER, Spec
from dsconvert.quantization.gptq_grid import Scheme
from dsconvert.quantization.linears import LINEARS

GROUP = 128  # of the GPTQ types and integer schemes listed
GPTQ_BITS = (2, 3, 4, 8)
EXL2_RATES = (2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0)
EXL2_HEAD = 6


def folder_types(model: str, config: ModelConfig, specs: list[Spec], beside: int) -> Iterator[Made]:
    """Every type of a folder that a decoder's tensors may have; `beside` are values of what stays in 16 bits.

    `model` stands in the commands that make them.
    """
    if calibrated(config):
        yield from _exl2(model, specs, beside)
        yield from _gptq(model, specs, beside)
    yield from _compressed(model, config, specs, beside)
    yield from _mlx(model, config, specs)


def calibrated(config: ModelConfig) -> bool:
    """Whether a model is one of those that are run on calibration text: all linears see every token."""
    return config.experts is None and config.latent is None


def _linears(specs: list[Spec]) -> dict[str, tuple[int, ...]]:
    """The linears of the blocks, every expert one: their shapes [outputs, inputs] by name."""
    chosen = [spec for spec in specs if _is_linear(spec)]
    return {name: spec.source for spec in chosen for name in spec.names}


def _is_linear(spec: Spec) -> bool:
    return spec.role in SOLVE_ORDER and spec.hf.endswith(".weight")


def _gptq(model: str, specs: list[Spec], beside: int) -> Iterator[Made]:
    for bits in GPTQ_BITS:
        scheme = Scheme(bits, GROUP, True)
        try:
            check_gptq(_linears(specs), Layout(scheme))
        except QuantizationError:
            continue
        weights = weights_of(specs, partial(_gptq_size, scheme), 2 * beside)
        yield Made(
            f"gptq {bits}",
            ("transformers",),
            weights,
            f"dsconvert gptq {model} --bits {bits}",
        )


def _gptq_size(scheme: Scheme, spec: Spec) -> int:
    if not _is_linear(spec):
        return 2 * spec.values
    outputs, inputs = spec.source
    parts = stored_shapes("", outputs, inputs, scheme.groups(inputs), scheme.bits).values()
    return spec.many * sum({"I32": 4, "F16": 2}[kind] * prod(shape) for kind, shape in parts)


def _compressed(model: str, config: ModelConfig, specs: list[Spec], beside: int) -> Iterator[Made]:
    """The schemes that a model may have: of experts and latent attention those that need no calibration."""
    for scheme in SCHEMES.values():
        chosen = [spec for spec in specs if spec.hf.endswith(".weight") and _rounded(spec)]
        shapes = {name: spec.source for spec in chosen for name in spec.names}
        if scheme.bits and not calibrated(config):
            continue
        try:
            if scheme.bits:
                check_integers(shapes, Scheme(scheme.bits, GROUP))
            else:
                check_floats(shapes, scheme)
        except QuantizationError:
            continue
        weights = weights_of(specs, partial(_compressed_size, scheme), 2 * beside)
        command = f"dsconvert compressed {model} --scheme {scheme.name}" + " --calib c4" * bool(scheme.bits)
        yield Made(scheme.name, ("vllm",), weights, command)


def _rounded(spec: Spec) -> bool:
    """Whether a format that rounds to nearest has a tensor on its grid."""
    return spec.role in LINEARS and spec.hf.endswith(".weight")


def _compressed_size(scheme: Row, spec: Spec) -> int:
    if not _rounded(spec):
        return 2 * spec.values
    outputs, inputs = spec.source
    grid = Scheme(scheme.bits, GROUP)
    if scheme.bits:
        return _share(spec, compressed_shapes(outputs, inputs, grid.groups(inputs), grid.bits, True))
    return _share(spec, scheme.shapes(outputs, inputs))


def _share(spec: Spec, shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """The bytes of a row of the table, which may be a part of the tensors that take these shapes."""
    nbytes = sum(BITS[kind] * prod(shape) // 8 for kind, shape in shapes.values())
    return nbytes * spec.values // prod(spec.source)


def _mlx(model: str, config: ModelConfig, specs: list[Spec]) -> Iterator[Made]:
    """Groups of mlx-lm's usual width; embedding and head too, as it has them."""
    architecture = find_architecture(config.architecture)
    if not architecture.mlx or architecture.mount is not None:
        return
    for bits in MLX_BITS:
        settings = Affine(bits)
        try:
            check_mlx({n: s.source for s in specs if _on_mlx(s) for n in s.names}, settings)
        except QuantizationError:
            return
        weights = weights_of(specs, partial(_mlx_size, settings))
        command = f"dsconvert mlx {model} --bits {bits}" + " --calib c4" * calibrated(config)
        yield Made(f"mlx {bits}", ("mlx",), weights, command)


def _on_mlx(spec: Spec) -> bool:
    return (_rounded(spec) or spec.role in ("embed", "head")) and not spec.hf.endswith(SPLIT)


def _mlx_size(settings: Affine, spec: Spec) -> int:
    if not (_on_mlx(spec) and spec.hf.endswith(".weight") and len(spec.source) == 2):
        return 2 * spec.values
    return _share(spec, mlx_shapes(*spec.source, settings, "bf16"))


def _exl2(model: str, specs: list[Spec], beside: int) -> Iterator[Made]:
    try:
        check_exl2(_linears(specs))
    except QuantizationError:
        return
    for rate in EXL2_RATES:
        weights = weights_of(specs, partial(_exl2_size, rate), 2 * beside)
        yield Made(f"exl2 {rate:g}", ("exllamav2",), weights, f"dsconvert exl2 {model} --bpw {rate:g}")


def _exl2_size(rate: float, spec: Spec) -> int:
    if _is_linear(spec):
        return int(rate * spec.values / 8)
    if spec.role == "head":
        outputs, inputs = spec.source
        return bits_of(inputs, outputs, groups_for(inputs, HEADS[EXL2_HEAD])) // 8
    return 2 * spec.values
