"""The linears of a run in four-bit floats: solved, as the folder stores them, and read back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from converters.compressed.fed import FED, solve
from converters.compressed.nearest import largest_together
from converters.compressed.plan import Job
from converters.compressed.rounded import global_scale
from converters.compressed.stated import Weights
from converters.compressed.stored import LAYOUTS
from dsconvert.checkpoints.quantized import Linear
from dsconvert.checkpoints.safetensors_reader import Stored
from dsconvert.quantization.blocks import Restore
from dsconvert.quantization.known_inputs import remembering, untrusted
from dsconvert.quantization.run import Coded, SolveOne

if TYPE_CHECKING:
    import torch

GLOBAL = "weight_global_scale"


def solver(job: Job) -> SolveOne:
    """Solves a linear of the job's scheme, with one global scale for those that are fused."""
    options, kind = job.options, FED[job.options.scheme]
    inputs_of, together = remembering(options.damp, options.act_order), largest_together(job)

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        import torch

        linear = job.model.linears[name]
        whole = GLOBAL in options.row.shapes(*linear.shape)
        by = global_scale(together(name)) if whole else np.float32(1)
        found = solve(W, inputs_of(H) if few is None else untrusted(H, few), kind, by, options.mse)
        parts = {"weight_packed": found.nibbles, "weight_scale": found.scales}
        parts |= {GLOBAL: np.array([by])} if whole else {}
        tensors = {f"{linear.stem}.{part}": array for part, array in parts.items()}
        return found, tensors, torch.from_numpy(found.weights(kind, by)).to(W.device)

    return solved


def restorer(job: Job) -> Restore:
    """The weights of a finished linear, as the folder's reader has them."""
    kind = job.options.row.type

    def restored(name: str, stored: Mapping[str, Stored]) -> torch.Tensor:
        import torch

        linear = job.model.linears[name]
        prefix = f"{linear.stem}."
        parts = {key.removeprefix(prefix): one for key, one in stored.items() if key.startswith(prefix)}
        outputs, inputs = linear.shape
        one = Linear(linear.stem, outputs, inputs, kind, Weights(kind, 4), LAYOUTS[kind].kind, parts)
        return torch.from_numpy(one.kind.rows(one, 0, outputs))

    return restored
