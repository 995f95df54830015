"""Runs gptqmodel on the tokens and with the settings of a `dsconvert gptq` run; see tests/peers for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# What is compared with what: our options, and the peer's for the same order of columns. Its act-order for
# files without desc_act sorts columns inside groups, and the groups; it has no better one.
ORDERS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "natural": ({"act_order": False}, {"desc_act": False, "act_group_aware": False}),
    "static": ({"act_order": True}, {"desc_act": False, "act_group_aware": True}),
    "dynamic": (
        {"act_order": True, "dynamic_groups": True},
        {"desc_act": True, "act_group_aware": False},
    ),
}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what is printed meanwhile, by whatever way."""
    kept = os.dup(1), os.dup(2)
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        yield
    finally:
        for number, descriptor in enumerate(kept, 1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.close(sink)


def load() -> Any:
    """The package, which takes seconds to import."""
    # Two cores need two workers, and one thread each: packing is hundreds of times slower with more.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with quiet():
        import gptqmodel
    return gptqmodel


def quantize(model: Path, tokens: npt.NDArray[np.int64], out: Path, order: str, **settings: Any) -> None:
    """gptqmodel's folder `out` of the checkpoint, run in float32 as ours.

    `out` is absolute, `tokens` [n, length] are its calibration; `settings` go to its QuantizeConfig.
    """
    package = load()
    import torch

    out.parent.mkdir(parents=True, exist_ok=True)
    model = model.absolute()
    rows = [torch.from_numpy(row)[None] for row in tokens]
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    with quiet(), chdir(out.parent):  # it leaves logs where it runs
        config = package.QuantizeConfig(sym=True, offload_to_disk=False, **ORDERS[order][1], **settings)
        loaded = package.GPTQModel.load(str(model), config, device="cpu", dtype=torch.float32)
        loaded.quantize(examples, batch_size=1)
        loaded.save(str(out))
