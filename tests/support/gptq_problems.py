"""Weights and Hessians for GPTQ's solver, and what its tests need to name and to judge a result."""

from __future__ import annotations

from typing import Any

import torch

from dsconvert.quantization.gptq_solver import SolverOptions

ORDERS: tuple[dict[str, bool], ...] = ({}, {"act_order": True}, {"act_order": True, "dynamic_groups": True})


def problem(outputs: int, inputs: int, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Weights and a Hessian of correlated inputs whose channels differ in size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(4 * inputs, inputs // 4) @ normal(inputs // 4, inputs) + 0.5 * normal(4 * inputs, inputs)
    x *= torch.exp(0.7 * normal(inputs))
    return (normal(outputs, inputs) * 0.02).to(dtype), (2 / len(x) * x.T @ x).to(dtype)


def label(options: SolverOptions) -> str:
    s = options.scheme
    words = [name for name in ("act_order", "dynamic_groups") if getattr(options, name)]
    words += ["minmax"] * (not options.mse)
    return "-".join([f"{s.bits}bit", f"g{s.group_size}", "sym" if s.sym else "asym", *words])


def direct_loss(error: torch.Tensor, H: torch.Tensor) -> float:
    e = error.double()
    return float(torch.einsum("nk,kl,nl->", e, H.double(), e))
