"""The EXL2 folder: the blocks solved, what stays in float16, a bigger model's other parts beside."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from converters.exl2 import measure as measuring
from converters.exl2.measure import Measured
from converters.exl2.plan import Job, raw_config
from converters.exl2.settings import Group
from converters.exl2.shapes import HEAD_WEIGHT
from dsconvert import __version__
from dsconvert.calibration.record import Calibration
from dsconvert.checkpoints.checkpoint import Checkpoint
from dsconvert.checkpoints.output_folder import Naming, write_folder
from dsconvert.checkpoints.safetensors_writer import Piece, from_stored
from dsconvert.errors import QuantizationError
from dsconvert.models.weights import widened

NAMING = Naming("output", index=False)  # the runtime takes every *.safetensors; an index could be stale
VISION = "vision"
AT_ONCE = 1 << 22  # values that are cast together


@dataclass(frozen=True)
class Choice:
    """What each linear gets: `settings` and `groups` by name, the head's groups among them.

    `bpw` is the bits per weight of the blocks' linears, `expected` the nats that they are foretold to cost.
    """

    settings: Mapping[str, str] = field(repr=False)
    groups: Mapping[str, tuple[Group, ...]] = field(repr=False)
    bpw: float
    expected: float

    def text(self, name: str) -> str:
        """The setting of a linear, for tables."""
        return self.settings.get(name, "head")

    def stem(self, job: Job, name: str) -> str:
        """A linear's name in the output, without ".weight"."""
        return HEAD_WEIGHT.removesuffix(".weight") if name == HEAD_WEIGHT else job.model.linears[name].stem


def write(
    job: Job,
    calibration: Calibration,
    measured: Measured,
    choice: Choice,
    solved: Mapping[str, Piece],
    fell_back: Mapping[str, str],
) -> int:
    """Write the folder, of what is kept and of the `solved` tensors; returns the bytes of its weights."""
    checkpoint = job.model.checkpoint
    pieces = {out: as_half(checkpoint, name) for out, name in job.kept.items()}
    vision = {name: from_stored(checkpoint.tensors[name]) for name in job.vision}
    return write_folder(
        job.out,
        checkpoint.folder,
        raw_config(job),
        {**pieces, **solved},
        quantization_settings(job, calibration, choice, fell_back),
        extra={"measurement.json": measuring.as_file(measured, job.model.shapes)},
        beside={VISION: vision} if vision else {},
        naming=NAMING,
        force=job.run.force,
        inputs=job.inputs,
        seen=checkpoint.seen,
    )


def as_half(checkpoint: Checkpoint, name: str) -> Piece:
    """A tensor as float16; QuantizationError, when it is written, for values that float16 cannot hold."""
    shape = checkpoint.tensors[name].shape
    rows = shape[0] if shape else 1
    step = max(1, AT_ONCE * rows // math.prod(shape))

    def chunks() -> Iterator[bytes | memoryview]:
        for start in range(0, rows, step):
            values = widened(checkpoint.rows(name, start, min(start + step, rows)))
            with np.errstate(over="ignore"):
                half = values.astype("<f2")
            if not np.isfinite(half).all():
                raise QuantizationError(
                    "holds values that float16 cannot",
                    where=name,
                    why=f"The largest magnitude is {np.abs(values).max():.3g}",
                    hint="exllamav2 computes in float16; use dsconvert gguf",
                )
            yield half.tobytes()

    return Piece("F16", shape, chunks)


def quantization_settings(
    job: Job, calibration: Calibration, choice: Choice, fell_back: Mapping[str, str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json: what the runtime's own converter states, and provenance."""
    rows, length = calibration.tokens.shape
    found: dict[str, Any] = {
        "quantizer": [f"dsconvert:{__version__}"],
        "bits_per_weight": round(choice.bpw, 4),
        "expected_kld": choice.expected,
        "damp_percent": job.options.damp,
        "calibration": calibration.report.as_dict(),
        "settings": dict(choice.settings),
    }
    return {
        "quant_method": "exl2",
        "version": "0.3.2",  # of the runtime whose format this is
        "bits": job.options.bpw,
        "head_bits": job.options.head_bits,
        "calibration": {"rows": rows, "length": length, "dataset": calibration.report.text},
        "meta": found | ({"round_to_nearest": fell_back} if fell_back else {}),
    }
