"""Runs a decoder block by block from any WeightSource: a block is loaded, used and dropped.

Built on transformers' own modules, made on the meta device with the weights assigned, so that the
arithmetic is the reference's. Peak memory is the blocks that the caller holds, plus activations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dsconvert.decoder import numpy_decoder
from dsconvert.decoder.experts import (
    Load,
    Names,
    Observer,
    StreamedExperts,
    arguments,
    attend,
    expert_names,
)
from dsconvert.decoder.numpy_config import Numbers
from dsconvert.decoder.torch_config import library_config, numbers_of, open_rotary, torch_classes
from dsconvert.errors import UsageError
from dsconvert.models.config import ModelConfig
from dsconvert.models.weights import WeightSource, widened

if TYPE_CHECKING:
    import torch

IntArray = npt.NDArray[np.int64]
DTYPES = ("float32", "bfloat16", "float16")
BATCH_TOKENS = {"cpu": 1024, "cuda": 8192}  # bounds the MLP's intermediate activations
CHOICE = ".e_score_correction_bias"  # the end of its name
EMBED, NORM, HEAD = numpy_decoder.EMBED, numpy_decoder.NORM, numpy_decoder.HEAD
LOGITS_AT_ONCE = 1 << 23  # one float64 array of them is 64 MB
ROWS_AT_ONCE = 1 << 23  # values of embedding or head that are read together: 32 MB in float32
READ_WHOLE = 1 << 26  # values of a matrix that are read at once, though there are two copies for a moment


@dataclass(frozen=True)
class Decoder:
    """A decoder over a WeightSource: which tensors each block has, and where and in which type it runs."""

    source: WeightSource
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype
    blocks: tuple[dict[str, str], ...]  # per layer: module attribute -> tensor name
    head: str  # the tensor of the output head; the embedding when tied
    experts: tuple[tuple[Names, ...], ...]  # per layer: the tensors of each expert; see `experts.streamed`
    library: Any = field(repr=False)  # transformers' config
    rotary: Any = field(repr=False)
    shapes: Mapping[str, tuple[int, ...]] = field(repr=False)  # of every tensor, tens of thousands of them

    @property
    def batch_tokens(self) -> int:
        """How many tokens go through a block at once."""
        return BATCH_TOKENS.get(self.device.type, 1024)


@dataclass(frozen=True)
class Block:
    """One decoder layer with its weights; `linears` are its linear modules by tensor name.

    `experts` stand in for those of a layer that has some; their weights are read as they are needed.
    """

    index: int
    module: Any
    linears: Mapping[str, torch.nn.Linear]
    experts: StreamedExperts | None = None


def pick_device(name: str = "auto") -> torch.device:
    """The device called "auto", "cpu", "cuda" or "cuda:N"; UsageError for another, or where it is not."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and (kind == "cpu" or not number.isdecimal())):
        raise UsageError(f"device {name!r} is unknown", hint="Use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind == "cuda" and int(number or 0) >= count:
        raise UsageError(
            f"device {name!r} is not there",
            why=f"PyTorch {torch.__version__} sees {count} CUDA devices",
            hint="Use --device cpu, or install a PyTorch built for your driver",
        )
    return torch.device(name)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type called `name`, or the device's own: float32 on a CPU, bfloat16 on CUDA; UsageError."""
    import torch

    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise UsageError(f"type {name!r} is unknown", hint="Use " + ", ".join(DTYPES))
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def open_decoder(
    source: WeightSource, config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> Decoder:
    """Match the source with its architecture's table and prepare to run it; reads no weights.

    Raises PlanError when tensors are missing, unknown or misshapen, CheckpointError when transformers
    does not accept the config.
    """
    blocks, head = numpy_decoder.tensor_names(source, config)
    library = library_config(config)
    rotary = open_rotary(config, library, device)
    experts, shapes = expert_names(config), source.shapes()
    return Decoder(source, config, device, dtype, blocks, head, experts, library, rotary, shapes)


def numbers(decoder: Decoder) -> Numbers:
    """What transformers made of the decoder's config."""
    return numbers_of(decoder.config, decoder.library, decoder.rotary)


def read(decoder: Decoder, name: str, rows: slice | None = None) -> torch.Tensor:
    """A tensor, or `rows` of it, in float32 on the decoder's device, in memory that nothing else uses."""
    import torch

    source, shape = decoder.source, decoder.shapes[name]
    if rows is None and len(shape) == 2 and math.prod(shape) > READ_WHOLE:
        tensor = torch.empty(shape, dtype=torch.float32)
        for part in slices(*shape):
            np.copyto(tensor.numpy()[part], widened(source.rows(name, part.start, part.stop)))
        return tensor.to(decoder.device)
    array = source.float32(name) if rows is None else widened(source.rows(name, rows.start, rows.stop))
    # A copy in torch's own alignment: equal weights then give bit-equal products, wherever they came from.
    tensor = torch.empty(array.shape, dtype=torch.float32)
    np.copyto(tensor.numpy(), array)
    return tensor.to(decoder.device)


def embed(weight: torch.Tensor, windows: IntArray, dtype: torch.dtype) -> torch.Tensor:
    """Token ids [n, length] to hidden states [n, length, d]; UsageError for an id outside the table."""
    import torch

    check_ids(windows, weight.shape[0])
    ids = torch.as_tensor(windows, dtype=torch.int64).to(weight.device)
    return weight[ids].to(dtype)


def check_ids(windows: IntArray, vocab: int) -> None:
    """Raises UsageError unless the windows are [n, length] of ids below `vocab`."""
    if windows.ndim != 2 or not windows.size:
        raise UsageError(f"windows of tokens have the shape {list(windows.shape)}, should be [n, length]")
    if windows.min() < 0 or windows.max() >= vocab:
        raise UsageError(
            f"a token id is outside the {vocab} rows of the embedding",
            why=f"ids go from {windows.min()} to {windows.max()}",
            hint="The tokenizer is not this model's",
        )


def load_block(decoder: Decoder, index: int, load: Load | None = None) -> Block:
    """Read and assemble one decoder layer; `load` as for `assemble_block`."""
    weights = {name: read_as_run(decoder, name) for name in decoder.blocks[index].values()}
    return assemble_block(decoder, index, weights, load)


def as_run(decoder: Decoder, name: str, weight: torch.Tensor) -> torch.Tensor:
    """A tensor in the type in which the decoder runs it; float32 where the choice of experts hangs on it."""
    return weight if name.endswith(CHOICE) else weight.to(decoder.dtype)


def assemble_block(
    decoder: Decoder, index: int, weights: Mapping[str, torch.Tensor], load: Load | None = None
) -> Block:
    """One decoder layer of the weights given by tensor name; they are used, not copied.

    `load` reads a matrix of an expert, by default from the decoder's source.
    """
    import torch

    names, experts = decoder.blocks[index], None
    with torch.device("meta"):
        module = torch_classes(decoder.config).layer(decoder.library, index)
    if decoder.experts[index]:
        experts = StreamedExperts(decoder.experts[index], load or (lambda name: read_as_run(decoder, name)))
        if hasattr(module.mlp, "experts"):
            del module.mlp.experts
            module.mlp.experts = experts
        else:
            del module.mlp
            module.mlp = experts.alone
    state = {attribute: weights[name] for attribute, name in names.items()}
    for attribute, parameter in module.named_parameters():
        if attribute.endswith(".bias") and attribute not in state:  # as transformers starts it
            state[attribute] = torch.zeros(parameter.shape, dtype=decoder.dtype, device=decoder.device)
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False).eval()
    linears = {
        names[f"{attribute}.weight"]: part
        for attribute, part in module.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    return Block(index, module, linears, experts)


def read_as_run(decoder: Decoder, name: str) -> torch.Tensor:
    """A tensor in the type in which the decoder runs it."""
    return as_run(decoder, name, read(decoder, name))


def run_block(
    decoder: Decoder, block: Block, hidden: torch.Tensor, observers: Mapping[str, Observer] | None = None
) -> torch.Tensor:
    """Hidden states [n, length, d] through one block, in batches of windows; returns new states.

    `observers` are called with the input [batch, length, in] of the linear whose tensor they are named
    by, before it is applied; what they return, if anything, is the input in its stead. Experts take the
    states of all windows at once, so that each is read once.
    """
    import torch

    run = apply if block.experts is None else attend
    out = torch.empty_like(hidden)
    with torch.no_grad(), _watching(block, {} if observers is None else observers):
        for rows in batches(decoder, hidden.shape[0], hidden.shape[1]):
            out[rows] = run(decoder, block, hidden[rows])
        if block.experts is not None:
            out += block.module.mlp(block.module.post_attention_layernorm(out))
    return out


def apply(decoder: Decoder, block: Block, x: torch.Tensor) -> torch.Tensor:
    """States [batch, length, d] through one block, with gradients where they are on."""
    result = block.module(x, **arguments(decoder, x))
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


def batches(decoder: Decoder, windows: int, length: int) -> Iterator[slice]:
    """Slices of the windows so that each holds about `decoder.batch_tokens` tokens."""
    return _cut(0, windows, decoder.batch_tokens // length)


@contextmanager
def _watching(block: Block, observers: Mapping[str, Observer]) -> Iterator[None]:
    def hook(observer: Observer) -> Callable[[Any, tuple[torch.Tensor, ...]], torch.Tensor | None]:
        return lambda module, args: observer(args[0])

    own = {name: observer for name, observer in observers.items() if name in block.linears}
    handles = [block.linears[name].register_forward_pre_hook(hook(o)) for name, o in own.items()]
    if block.experts is not None:
        block.experts.observers = observers
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if block.experts is not None:
            block.experts.observers = {}


def slices(rows: int, columns: int) -> Iterator[slice]:
    """Rows of a matrix in slices of about ROWS_AT_ONCE values."""
    return _cut(0, rows, ROWS_AT_ONCE // columns)


def chunks(first: int, last: int, vocab: int) -> Iterator[slice]:
    """Positions first ... last - 1 in slices, so that the logits of one are about LOGITS_AT_ONCE values."""
    return _cut(first, last, LOGITS_AT_ONCE // vocab)


def _cut(first: int, last: int, most: int) -> Iterator[slice]:
    step = max(1, most)
    return (slice(start, min(start + step, last)) for start in range(first, last, step))


def head_weights(decoder: Decoder) -> tuple[torch.Tensor, torch.Tensor]:
    """The final norm [d] and the head [vocab, d] in the decoder's dtype."""
    return read(decoder, NORM).to(decoder.dtype), read(decoder, decoder.head).to(decoder.dtype)


def logits(decoder: Decoder, norm: torch.Tensor, head: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Final norm and head: hidden states [tokens, d] to logits [tokens, vocab] in float32.

    `norm` [d] and `head` [vocab, d] are in the decoder's dtype. The caller chooses how many tokens at once.
    """
    import torch

    with torch.no_grad():
        return torch.nn.functional.linear(normed(decoder, norm, hidden), head).float()


def normed(decoder: Decoder, norm: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., d] after the final norm, whose weight is `norm` [d] in the decoder's dtype."""
    import torch

    with torch.device("meta"):
        final = torch_classes(decoder.config).norm(
            decoder.library.hidden_size, eps=decoder.library.rms_norm_eps
        )
    final.load_state_dict({"weight": norm}, assign=True)
    final.requires_grad_(False)
    result: torch.Tensor = final(hidden)
    return result


def finite(hidden: torch.Tensor) -> bool:
    """Whether every value is a number; one pass, no mask in memory: NaN is the least and the greatest."""
    return all(math.isfinite(float(value)) for value in hidden.aminmax())
