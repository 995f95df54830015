"""Reads pytorch_model.bin: torch's restricted unpickler over the mapped zip, so that no code runs."""

from __future__ import annotations

import pickle
import shlex
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.checkpoints.safetensors_header import damaged
from dsconvert.checkpoints.safetensors_reader import READABLE, Array, Stored, check_file
from dsconvert.errors import CheckpointError, quoted, short
from dsconvert.reading import read_head

if TYPE_CHECKING:
    import torch

PICKLE_LIMIT = 64 << 20  # a 67B model's names and shapes need less than 1 MiB
MEMBERS_LIMIT = 1 << 20
# Where trainers keep the model inside of a checkpoint that holds more, the commonest first.
TRAINERS_KEYS = ("state_dict", "model_state_dict", "model", "module")
DTYPES = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "float64": "f64"}
# The file's name is not part of the code: it may hold anything.
RESAVE = (
    "Save it again in the current format, which runs no code either: python -c "
    '"import sys, torch; f = sys.argv[1]; torch.save(torch.load(f, weights_only=True), f)" {name}'
)
RESAVE_TRUSTED = (
    "Ask for a safetensors version; or, if you trust the file, load it with the program that wrote it "
    "and save its state_dict() with safetensors.torch.save_file"
)


def read_torch(path: Path) -> dict[str, Stored]:
    """Every tensor of a zip file that `torch.save` wrote from a state dict, by name, mapped and not read.

    Of a trainer's checkpoint, {"state_dict": {...}, "epoch": 3}, the names begin with "state_dict.". A view
    is strided where the saved tensor was. Raises CheckpointError for an old non-zip pickle, for a file that
    needs more than the restricted unpickler grants, and for a damaged one.
    """
    size = check_file(path)
    _check_zip(path, size)
    state = _load(path)
    if not isinstance(state, dict) or not state:
        raise _no_state_dict(path, f"It holds a {type(state).__name__}")
    state = _weights(state)
    mappings = _mappings(path)
    return {_key(path, name): _stored(path, name, value, mappings) for name, value in state.items()}


def _weights(state: dict[Any, Any]) -> dict[Any, Any]:
    """The state dict itself, or the one that a trainer's checkpoint holds, its key before every name."""
    if any(_is_tensor(value) for value in state.values()):
        return state
    inner = {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, dict) and value and all(map(_is_tensor, value.values()))
    }
    for key in (*TRAINERS_KEYS, *(inner if len(inner) == 1 else ())):
        if key in inner:
            return {f"{key}.{name}" if isinstance(name, str) else name: t for name, t in inner[key].items()}
    return state


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _check_zip(path: Path, size: int) -> None:
    """The archive is one that torch can map: stored members, no more bytes than the file has."""
    head = read_head(path, 4)
    if head != b"PK\x03\x04":
        if head[:1] != b"\x80":
            raise damaged(path, "It is not a PyTorch file: neither a zip archive nor a pickle")
        raise CheckpointError(
            "is an old PyTorch pickle that cannot be mapped",
            where=path,
            why="Reading it would load the whole file into memory",
            hint=RESAVE.format(name=shlex.quote(path.name)),
        )
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            order = [
                archive.read(m) for m in members if m.filename.endswith("/byteorder") and m.file_size < 16
            ]
    except Exception as error:  # zipfile raises a dozen kinds for damaged archives
        raise damaged(path, f"Its zip directory cannot be read: {short(error)}") from None
    pickles = [member for member in members if member.filename.endswith("/data.pkl")]
    if len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT or len(members) > MEMBERS_LIMIT:
        raise damaged(path, "It has no single data.pkl of a credible size, so torch.save did not write it")
    if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
        raise damaged(path, "Its zip members are compressed, which torch.save never does")
    if sum(member.file_size for member in members) > size:
        raise damaged(path, "Its zip members are larger than the file")
    if any(value != b"little" for value in order):
        raise CheckpointError("was written on a big-endian machine", where=path, hint=RESAVE_TRUSTED)


def _load(path: Path) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd pickles, which are errors below where they matter
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the unpickler runs untrusted opcodes: any kind may come
        reason = _reason(error)
        if isinstance(error, pickle.UnpicklingError) and ("GLOBAL" in reason or "allowlisted" in reason):
            raise CheckpointError(
                "would run code when it is loaded, or holds more than tensors",
                where=path,
                why=reason,
                hint=RESAVE_TRUSTED,
            ) from None
        raise damaged(path, f"PyTorch cannot load it: {reason}") from None


def _reason(error: Exception) -> str:
    """What torch met, out of its long text: the line with the cause, without its advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(("Weights only", "Check the doc", "(1)", "(2)"))]
    cause = (causes or [type(error).__name__])[0].split("WeightsUnpickler error: ")[-1]
    return "".join(c for c in cause.split(". Please ")[0] if c.isprintable())[:160]


def _no_state_dict(path: Path, why: str) -> CheckpointError:
    hint = "Give the state dict that save_pretrained writes: names to tensors, nothing else"
    return CheckpointError("is not a state dict", where=path, why=why, hint=hint)


def _key(path: Path, name: object) -> str:
    if not isinstance(name, str):
        raise _no_state_dict(path, f"It has the key {quoted(name)}, which is not a string")
    return name


def _stored(path: Path, name: object, value: Any, mappings: list[tuple[int, int, int]]) -> Stored:
    import torch

    if not isinstance(value, torch.Tensor):
        raise _no_state_dict(path, f"{quoted(name)} is a {type(value).__name__}, not a tensor")
    tensor = value.detach()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise _no_state_dict(path, f"{quoted(name)} is not a plain dense tensor")
    dtype = str(tensor.dtype).removeprefix("torch.")
    dtype = DTYPES.get(dtype, dtype)
    nbytes = tensor.numel() * tensor.element_size()
    offset = _offset(tensor, nbytes, mappings) if tensor.is_contiguous() else None
    data = _view(tensor, dtype) if dtype in READABLE else None
    return Stored(path, dtype, tuple(tensor.shape), nbytes, offset, data)


def _view(tensor: torch.Tensor, dtype: str) -> Array:
    """The tensor's memory as numpy sees it, strides kept; bf16 as its bits, which numpy has no type for."""
    import torch

    array: Array = tensor.view(torch.int16).numpy() if dtype == "bf16" else tensor.numpy()
    array = array.view(READABLE[dtype])
    array.flags.writeable = False
    return array


def _mappings(path: Path) -> list[tuple[int, int, int]]:
    """Where this process has `path` mapped: (first address, end, offset in the file); Linux only."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "surrogateescape").splitlines()
        real = str(path.resolve())
    except OSError:
        return []
    found = []
    for line in lines:
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5] == real:
            first, end = (int(address, 16) for address in fields[0].split("-"))
            found.append((first, end, int(fields[2], 16)))
    return found


def _offset(tensor: torch.Tensor, nbytes: int, mappings: list[tuple[int, int, int]]) -> int | None:
    address = tensor.data_ptr()
    for first, end, offset in mappings:
        if first <= address and address + nbytes <= end:
            return address - first + offset
    return None
