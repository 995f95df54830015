"""What an MLX folder says of its quantization."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.mlx.plan import Job
from dsconvert import __version__


def affine_settings(job: Job) -> dict[str, Any]:
    """`quantization` of config.json: the settings of linears, and by path of those that have others."""
    inner = job.options.inner
    stated: dict[str, Any] = {"group_size": inner.group_size, "bits": inner.bits, "mode": "affine"}
    for name, linear in job.model.linears.items():
        own = job.affine(name)
        if own != inner:
            stated[linear.stem] = {"group_size": own.group_size, "bits": own.bits, "mode": "affine"}
    return stated


def quantization_settings(job: Job, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of config.json: the same, and what else the weights depend on."""
    meta = {"quantizer": [f"dsconvert:{__version__}"], **provenance}
    return {**affine_settings(job), "quant_method": "mlx", "meta": meta}
