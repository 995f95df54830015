"""What classes, settings and shapes mlx-lm reads, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping

from converters.mlx.affine import BITS, GROUP_SIZES, Affine
from dsconvert.errors import UsageError
from dsconvert.models.architectures import find_architecture
from dsconvert.quantization import shape_rules
from dsconvert.quantization.linears import Selection
from dsconvert.quantization.shape_rules import Rule

RULES = (Rule("mlx", "inputs are a multiple of the group size", lambda n, k, at: k % at.group_size == 0),)


def check_class(model: Selection, language_only: bool) -> None:
    """Refuse a class that mlx-lm does not read so; raises UsageError."""
    whole = find_architecture(model.checkpoint.config.architecture)
    if whole.mount is not None and not language_only:
        raise UsageError(
            f"{whole.hf_class} is not converted to MLX",
            why="mlx-lm has no class with image towers",
            hint="Give --language-only for a folder of its language model",
        )
    inner = find_architecture(model.config.architecture)
    if not inner.mlx:
        raise UsageError(
            f"{inner.hf_class} is not converted to MLX",
            why="mlx-lm 0.32 does not take its quantized tensors under the checkpoint's names",
            hint="docs/mlx.md says which classes are; mlx_lm.convert may round this one to nearest",
        )


def check_shapes(linears: Mapping[str, tuple[int, ...]], settings: Affine) -> None:
    """Refuse what MLX has no kernels for: UsageError for settings, QuantizationError for a matrix."""
    if settings.bits not in BITS:
        hint = "Use --bits " + ", ".join(map(str, BITS))
        raise UsageError(f"{settings.bits} bits are not a width that MLX has", hint=hint)
    if settings.group_size not in GROUP_SIZES:
        hint = "Use --group-size " + ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"groups of {settings.group_size} are not what MLX has", hint=hint)
    shape_rules.check_linears(linears)
    named = f"{settings.bits} bits, group {settings.group_size}"
    shape_rules.check_rules(RULES, linears, settings, ("mlx",), named)
