"""Writes the folder of a calibrated conversion: the linears solved, and all the rest as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsconvert.checkpoints.output_folder import write_folder
from dsconvert.checkpoints.safetensors_writer import Piece, from_stored
from dsconvert.quantization.plan import Job


def write_quantized(
    job: Job,
    solved: Mapping[str, Piece],
    settings: Mapping[str, Any],
    extra: Mapping[str, Mapping[str, Any] | str],
) -> int:
    """The folder, of what is kept and of the `solved` linears' tensors; returns the bytes of its weights.

    `settings` are its quantization_config, `extra` further files by name. Raises what `write_folder` raises.
    """
    model = job.model
    pieces = {out: from_stored(model.checkpoint.tensors[name]) for out, name in model.kept.items()}
    return write_folder(
        job.out,
        model.checkpoint.folder,
        model.raw,
        {**pieces, **solved},
        settings,
        extra=extra,
        force=job.run.force,
        inputs=job.inputs,
        seen=model.checkpoint.seen,
    )
