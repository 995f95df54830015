"""What llama.cpp computes of our file beside what transformers computes of the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from converters.gguf.convert import convert
from converters.gguf.output import Options

TOKENS = 300
LIMIT = 1e-9


def file_of(model: Path, out: Path, quant: str = "f32") -> Path:
    list(convert(Options(str(model), (quant,), out, effort="off", force=True)))
    return out


def token_ids() -> npt.NDArray[np.int64]:
    return np.random.default_rng(7).integers(20, 1900, TOKENS)


def logits(model: Path, ids: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
    """transformers' own, of the folder as it is; of `token_ids` unless others are given."""
    import torch
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        found = loaded(torch.from_numpy(token_ids() if ids is None else ids)[None]).logits[0]
    return np.asarray(found.numpy(), np.float64)


def divergence(base: npt.NDArray[np.float64], other: npt.NDArray[np.float64]) -> float:
    """Mean KL over all positions of two arrays of logits [tokens, vocab]."""
    logs = [x - x.max(-1, keepdims=True) for x in (base, other)]
    logs = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1).mean())


def measured(model: Path, out: Path) -> float:
    """The divergence of llama.cpp on our f32 file from transformers on the folder."""
    return divergence(logits(model), engine_logits(file_of(model, out)))


def engine_logits(file: Path, ids: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.float64]:
    """llama.cpp's, of a file; as `logits`."""
    from dsconvert.runtimes.llamacpp import Engine

    with Engine(file, n_ctx=TOKENS, threads=1) as engine:
        return np.asarray(engine.logits(token_ids() if ids is None else ids), np.float64)
