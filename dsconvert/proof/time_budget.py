"""How much of a comparison to run: all of it where that is quick, else a sample of blocks."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from dsconvert.decoder import torch_decoder as st
from dsconvert.events import BlockCompared, Event, Step
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource, widened
from dsconvert.proof.compare import Comparison, Run, check_sizes, compare, differences, judge, tensor_error
from dsconvert.proof.figures import BlockError, IntArray, TensorError, hidden_error, update_error
from dsconvert.proof.output_losses import rounded
from dsconvert.proof.row_sums import Matrix
from dsconvert.proof.thresholds import Thresholds, Verdict
from dsconvert.texts.windows import Windows

if TYPE_CHECKING:
    import torch

# Measured: a float32 GEMM gives 50-60 GFLOP/s per core of a server CPU, and reading, dequantizing and
# comparing a weight costs about 5 ns on each side. Both are taken cautiously, and CUDA's by guess.
CPU_FLOPS_PER_CORE, CUDA_FLOPS = 40e9, 40e12
READ_RATE = 0.2e9  # weights per second on one side
SAMPLE_TOKENS = 256
SAMPLE_ROWS = 16
LEAST_WINDOWS = 2


@dataclass(frozen=True)
class Speed:
    """What a device does in a second: floating-point operations; weights read and compared on one side."""

    flops: float
    reading: float


@dataclass(frozen=True)
class Effort:
    """What to run: over all blocks when `blocks` is None, else those; `text` says it and why."""

    windows: Windows
    blocks: tuple[int, ...] | None
    seconds: float
    text: str


def choose(
    config: ModelConfig,
    windows: Windows,
    mode: Literal["quick", "full"],
    device: str,
    seconds: float = 20.0,
    *,
    speed: Speed | None = None,
    least: int = LEAST_WINDOWS,
    tokens: int = SAMPLE_TOKENS,
) -> Effort:
    """Size a comparison: "full" runs everything; "quick" what takes about `seconds` by estimate.

    Quick takes as many of the windows as fit, at least `least` of them, or, where even they do not fit, a
    sample of blocks on one window of at most `tokens`: the first, the middle one, more where they fit.
    `speed` is the device's own estimate when None.
    """
    speed = speed or _speed(device)
    n, length = windows.tokens.shape
    reading = 2 * weights(config) / speed.reading
    window = 2 * length * forward_flops(config, length) / speed.flops
    fit = n if mode == "full" else min(n, int((seconds - reading) / window))
    if fit >= min(least, n):
        total = reading + fit * window
        text = f"all {config.layers} blocks over {fit} of {n} windows of {length} tokens, about {total:.0f} s"
        return Effort(Windows(windows.tokens[:fit], windows.first[:fit]), None, total, text)
    short = min(length, tokens)
    block = block_weights(config) * (2 / speed.reading + 4 * short / speed.flops)
    count = min(max(2, int(seconds / block)), config.layers)
    spread = np.linspace(0, config.layers - 1, count) if count > 2 else (0, config.layers // 2)
    blocks = tuple(sorted({int(i) for i in spread}))
    text = (
        f"blocks {', '.join(map(str, blocks))} of {config.layers} on {short} tokens, each on the reference's "
        f"input; all of it would take about {reading + n * window:.0f} s: --effort full"
    )
    return Effort(Windows(windows.tokens[:1, :short], windows.first[:1]), blocks, len(blocks) * block, text)


def _speed(device: str) -> Speed:
    import torch

    cuda = st.pick_device(device).type == "cuda"
    return Speed(CUDA_FLOPS if cuda else CPU_FLOPS_PER_CORE * torch.get_num_threads(), READ_RATE)


def forward_flops(config: ModelConfig, length: int) -> float:
    """Floating-point operations per token of one forward pass over windows of `length` tokens."""
    dims = config.dims
    block = dims["d"] * (2 * dims["q"] + 2 * dims["kv"] + 3 * dims["ff"]) + dims["q"] * length
    return 2.0 * (config.layers * block + dims["d"] * dims["v"])


def weights(config: ModelConfig) -> int:
    """How many weights the decoder has; biases and norms are left out."""
    tables = 1 if config.tied else 2
    return config.layers * block_weights(config) + tables * config.vocab_size * config.hidden_size


def block_weights(config: ModelConfig) -> int:
    """How many weights one decoder layer has."""
    dims = config.dims
    return dims["d"] * (2 * dims["q"] + 2 * dims["kv"] + 3 * dims["ff"])


def check(
    reference: WeightSource,
    candidate: WeightSource,
    config: ModelConfig,
    effort: Effort,
    limits: Thresholds,
    *,
    candidate_config: ModelConfig | None = None,
    device: str = "auto",
    dtype: str | None = None,
    token_bytes: IntArray | None = None,
) -> Generator[Event, None, tuple[Comparison, Verdict]]:
    """Run the chosen effort and judge it: yields what was chosen, progress, and each Check.

    Raises what `compare` raises.
    """
    yield Step("verifying " + effort.text)
    where: dict[str, Any] = {"candidate_config": candidate_config, "device": device, "dtype": dtype}
    comparison = yield from run(reference, candidate, config, effort, token_bytes=token_bytes, **where)
    said = judge(comparison, limits)
    yield from said.checks
    return comparison, said


def run(
    reference: WeightSource,
    candidate: WeightSource,
    config: ModelConfig,
    effort: Effort,
    *,
    token_bytes: IntArray | None = None,
    keep_states: bool = False,
    **where: Any,
) -> Generator[Event, None, Comparison]:
    """Run the chosen effort: `compare.compare` or `compare_blocks`, whose options `where` are."""
    if effort.blocks is None:
        more: dict[str, Any] = {"token_bytes": token_bytes, "keep_states": keep_states, **where}
        return (yield from compare(reference, candidate, config, effort.windows, **more))
    return (yield from compare_blocks(reference, candidate, config, effort.windows, effort.blocks, **where))


def compare_blocks(
    reference: WeightSource,
    candidate: WeightSource,
    config: ModelConfig,
    windows: Windows,
    blocks: tuple[int, ...],
    *,
    candidate_config: ModelConfig | None = None,
    device: str = "auto",
    dtype: str | None = None,
) -> Generator[Event, None, Comparison]:
    """Run some blocks of both models on the same input, and compare all their tensors.

    Block 0 gets the embedded text. Every other gets what the reference's block 0 made of it: not what it
    would see in the model, but states of the right kind, on which a wrong weight, layout or RoPE shows.
    """
    other = candidate_config or config
    check_sizes(config, other)
    place = st.pick_device(device)
    kind = st.pick_dtype(dtype, place)
    decoders = (
        st.open_decoder(reference, config, place, kind),
        st.open_decoder(candidate, other, place, kind),
    )
    run = Run(decoders, windows, differences(*map(st.numbers, decoders)), [], [])
    hidden = _embedded(run)
    for index in sorted({0, *blocks}):
        error, hidden, broken = _same_input(run, index, hidden)
        if broken:
            return run.ended(broken)
        if index in blocks:
            yield BlockCompared(index, config.layers, error.relative, error.cosine)
    return run.ended("")


def sample_tensors(
    reference: WeightSource, candidate: WeightSource, known: tuple[TensorError, ...], head_dim: int
) -> tuple[TensorError, ...]:
    """The errors of the tensors that are not among `known`, from some rows of each."""
    seen = {tensor.name for tensor in known}
    found = []
    for name, shape in candidate.shapes().items():
        if name in seen or name not in reference.shapes():
            continue
        matrix, pair = Matrix(), (reference, candidate)
        if len(shape) == 1:
            matrix.add(*(source.float32(name) for source in pair))
        for rows in _sampled(shape[0]) if len(shape) > 1 else ():
            parts = [widened(source.rows(name, rows.start, rows.stop)) for source in pair]
            made = candidate.nearest(name, rows.start, parts[0])
            matrix.add(parts[0], parts[1], made, labels=range(rows.start, rows.stop))
        found.append(tensor_error(pair, (name, name), matrix, head_dim))
    return tuple(found)


def _sampled(rows: int) -> list[slice]:
    """The first rows of a matrix, some in the middle, and the last, none of them twice."""
    starts = (0, rows // 2, max(0, rows - SAMPLE_ROWS))
    stops = (*starts[1:], rows)
    return [slice(a, min(a + SAMPLE_ROWS, b)) for a, b in zip(starts, stops, strict=True) if a < b]


def _embedded(run: Run) -> torch.Tensor:
    """The reference's embedded text; of both tables only the rows in use are kept and compared."""
    import torch

    used, places = np.unique(run.windows.tokens, return_inverse=True)
    rows = []
    for decoder in run.pair:
        st.check_ids(run.windows.tokens, decoder.config.vocab_size)
        parts = [widened(decoder.source.rows(st.EMBED, i, i + 1)) for i in used.tolist()]
        rows.append(torch.from_numpy(np.concatenate(parts)))
    made = rounded(run.pair[1].source, st.EMBED, 0, rows[0], rows[1])
    run.note((st.EMBED, st.EMBED), Matrix().add(rows[0], rows[1], made, labels=used))
    base = rows[0].to(run.pair[0].device)
    return st.embed(base, places.reshape(run.windows.tokens.shape), run.pair[0].dtype)


def _same_input(run: Run, index: int, start: torch.Tensor) -> tuple[BlockError, torch.Tensor, str]:
    """One block of both on `start`; gives its error, the input for those that follow, and who broke."""
    base, candidate = run.apply(index, [start, start])
    broken = run.broken([base, candidate], f"after block {index}")
    relative, cosine = hidden_error(base, candidate)
    update = update_error(start, base, candidate)
    error = BlockError(index, *(float(part.double().mean()) for part in (relative, cosine, update)))
    run.blocks.append(error)
    return error, base if index == 0 else start, broken
