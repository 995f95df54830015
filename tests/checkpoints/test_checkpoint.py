"""The checkpoint reader against the libraries that wrote the files, its memory bound, its search rules."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from dsconvert.checkpoints.checkpoint import Checkpoint, open_checkpoint
from dsconvert.checkpoints.hub_model import Repository, hub_error
from dsconvert.errors import CheckpointError, ConversionError, UsageError
from dsconvert.models.weights import widened

ROOT = Path(__file__).parents[2]
PEERS = ROOT.parent / "shared" / "data" / "peers"
SMALL = tiny.Tiny(layers=1, d=16, ff=32, heads=2, kv_heads=1, vocab=48, tokenizer=False)
FORMATS = ("safetensors", "bin")


def small(folder: Path, **changes: object) -> Path:
    return tiny.tiny_checkpoint(folder, tiny.Tiny(**{**vars(SMALL), **changes}))


def refusal(model: str | Path | None, kind: type[ConversionError] = CheckpointError) -> str:
    """The message with which `model` is refused: one paragraph."""
    with pytest.raises(kind) as caught:
        open_checkpoint(model)
    text = str(caught.value)
    assert "\n" not in text
    return text


def in_process(code: str, *arguments: object, **environment: str) -> str:
    """What `code` prints in a process of its own."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- values, shapes, types and places -------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("form", FORMATS)
def test_values_equal_what_torch_loads(tmp_path: Path, form: str, dtype: str, shards: int) -> None:
    import torch
    from safetensors.torch import load_file

    checkpoint = open_checkpoint(small(tmp_path, format=form, dtype=dtype, shards=shards))
    expected: dict[str, torch.Tensor] = {}
    for path in checkpoint.files:
        expected |= load_file(path) if form == "safetensors" else torch.load(path, weights_only=True)
    assert len(checkpoint.files) == shards
    assert checkpoint.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        raw, values = checkpoint.tensors[name].data, checkpoint.float32(name)
        assert raw is not None
        assert checkpoint.dtype(name) == dtype
        assert raw.dtype == {"bf16": np.uint16, "f16": np.float16, "f32": np.float32}[dtype]
        assert not raw.flags.writeable
        rows = checkpoint.rows(name, 1, 3)
        assert np.shares_memory(rows, raw) == (dtype != "f16")
        assert rows.dtype == (np.uint16 if dtype == "bf16" else np.float32)
        assert np.array_equal(widened(rows), values[1:3])
        assert raw.shape == values.shape == tuple(tensor.shape)
        assert np.array_equal(values, tensor.float().numpy())
        assert values.flags.writeable
        assert values.flags.c_contiguous
        location = checkpoint.location(name)
        assert location is not None
        path, offset, nbytes = location
        assert path.read_bytes()[offset : offset + nbytes] == raw.tobytes()


def test_every_bf16_value_becomes_the_same_float32(tmp_path: Path) -> None:
    import torch

    bits = np.arange(1 << 16, dtype=np.uint16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny.safetensors_bytes({"x": bits}))
    (tmp_path / "config.json").write_text("{}")
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    values = open_checkpoint(path).float32("x")
    assert np.array_equal(values.view(np.uint32), expected.view(np.uint32))


def test_every_f16_value_becomes_the_same_float32(tmp_path: Path) -> None:
    import torch

    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(tiny.safetensors_bytes({"x": every}))
    (tmp_path / "config.json").write_text("{}")
    expected = torch.from_numpy(every).float().numpy()
    assert np.array_equal(open_checkpoint(path).rows("x", 0, 1 << 16), expected, equal_nan=True)


def test_f64_is_rounded_to_float32(tmp_path: Path) -> None:
    import torch

    values = torch.tensor([1 / 3, 1e-310, -1e39, 2.0**-149, float("nan")], dtype=torch.float64)
    torch.save({"x": values}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    rows = open_checkpoint(tmp_path).rows("x", 0, 5)
    assert rows.dtype == np.float32
    assert np.array_equal(rows, values.float().numpy(), equal_nan=True)


def test_a_file_written_by_the_library_opens(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {"a": torch.randn(3, 5).bfloat16(), "b": torch.zeros(0, 4), "c": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert np.array_equal(checkpoint.float32(name), tensor.float().numpy())
        assert checkpoint.shapes()[name] == tuple(tensor.shape)


def test_an_unpadded_header_reads_the_same(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    header = json.dumps({"x": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    header += b" " * ((1 - len(header)) % 4)  # the data then starts at an odd address
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(path)
    raw = checkpoint.tensors["x"].data
    assert raw is not None
    assert not raw.flags.aligned
    assert checkpoint.rows("x", 1, 3).flags.aligned
    assert np.array_equal(checkpoint.rows("x", 1, 3), values[1:])


def test_strided_and_shared_tensors_of_a_bin(tmp_path: Path) -> None:
    import torch

    base = torch.arange(24, dtype=torch.float32).reshape(4, 6).bfloat16()
    state = {
        "base": base,
        "transposed": base.T,
        "tail": base[2:],
        "expanded": base[:1].expand(5, 6),
        "parameter": torch.nn.Parameter(base.clone().float()),
        "empty": torch.zeros(0, 6),
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in state.items():
        assert np.array_equal(checkpoint.float32(name), tensor.detach().float().numpy()), name
        rows = checkpoint.rows(name, 1, 3)
        assert rows.flags.c_contiguous, name
        assert np.array_equal(widened(rows), tensor[1:3].detach().float().numpy()), name
    assert checkpoint.location("transposed") is None
    first, tail = checkpoint.location("base"), checkpoint.location("tail")
    assert first is not None
    assert tail is not None
    assert tail[1] - first[1] == 2 * 6 * 2


def test_many_threads_read_the_same_bytes(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small(tmp_path, shards=2, dtype="f32"))
    expected = {name: checkpoint.float32(name).tobytes() for name in checkpoint.shapes()}
    with ThreadPoolExecutor(8) as pool:
        got = list(
            pool.map(lambda name: (name, checkpoint.rows(name, 0, 1 << 20).tobytes()), list(expected) * 50)
        )
    assert len(got) == 50 * len(expected)
    assert all(expected[name] == value for name, value in got)


# --- memory: mapped, never loaded -----------------------------------------------------------------------

READ_ALL = """
import sys
from pathlib import Path
if sys.argv[2] == "bin":
    import torch
import numpy as np
from dsconvert.checkpoints.checkpoint import open_checkpoint

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

before = anonymous()
checkpoint = open_checkpoint(sys.argv[1])
total = sum(int(checkpoint.rows(name, 0, 1 << 20).max()) for name in checkpoint.shapes())
print(checkpoint.nbytes >> 10, anonymous() - before, "torch" in sys.modules)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc to measure memory")
@pytest.mark.parametrize("form", FORMATS)
def test_reading_200_mb_stays_mapped(tmp_path: Path, form: str) -> None:
    names = [f"t{i}" for i in range(4)]
    tensors = {name: np.full((5000, 5000), i, np.uint16) for i, name in enumerate(names)}
    (tmp_path / "config.json").write_text("{}")
    if form == "bin":
        tiny.write_bin(tmp_path / "pytorch_model.bin", tensors)
    else:
        (tmp_path / "model.safetensors").write_bytes(tiny.safetensors_bytes(tensors))
    kib, growth, torch_loaded = in_process(READ_ALL, tmp_path, form).split()
    assert int(kib) > 190 * 1024
    assert int(growth) < 8 * 1024
    assert torch_loaded == str(form == "bin")
    for path in tmp_path.glob("*model*"):
        path.unlink()


# --- what MODEL_PATH may be ------------------------------------------------------------------------------


def test_safetensors_win_over_bin(tmp_path: Path) -> None:
    small(tmp_path, format="bin", seed=1)
    small(tmp_path, format="safetensors", seed=2)
    assert [path.name for path in open_checkpoint(tmp_path).files] == ["model.safetensors"]


def test_a_single_file_with_its_config(tmp_path: Path) -> None:
    for form, name in (("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")):
        folder = small(tmp_path / form, format=form)
        checkpoint = open_checkpoint(folder / name)
        assert checkpoint.folder == folder
        assert set(checkpoint.shapes()) == set(tiny.tiny_shapes(SMALL))


def test_the_current_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small(tmp_path / "model"))
    assert open_checkpoint(None).folder == tmp_path / "model"
    monkeypatch.chdir(tmp_path)
    assert "No model is given" in refusal(None, UsageError)
    assert "No model is given" in refusal("", UsageError)


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_set_of_shards_needs_no_index(tmp_path: Path, form: str) -> None:
    small(tmp_path, shards=3, format=form)
    next(tmp_path.glob("*.index.json")).unlink()
    assert set(open_checkpoint(tmp_path).shapes()) == set(tiny.tiny_shapes(SMALL))
    next(tmp_path.glob("*-00002-of-*")).unlink()
    assert "holds 2 shards of 3" in refusal(tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_a_missing_shard_is_named(tmp_path: Path, form: str) -> None:
    small(tmp_path, shards=3, format=form)
    gone = next(tmp_path.glob("*-00002-of-*"))
    gone.unlink()
    assert gone.name in refusal(tmp_path)


def test_files_beside_the_model_are_no_weights(tmp_path: Path) -> None:
    small(tmp_path, shards=2)
    next(tmp_path.glob("*.index.json")).unlink()
    for name in ("adapter_model", "consolidated", "consolidated-00001-of-00002", "optimizer"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"not looked at")
    assert len(open_checkpoint(tmp_path).files) == 2


def test_shards_of_two_sets_are_ambiguous(tmp_path: Path) -> None:
    small(tmp_path, shards=2)
    next(tmp_path.glob("*.index.json")).unlink()
    (tmp_path / "model-00001-of-00003.safetensors").write_bytes(b"x")
    assert "more than one set" in refusal(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    text = refusal(tmp_path)
    assert "holds no weights" in text
    assert "model.gguf" in text


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\n<html><head><title>429</title>", "web page"),
        (b"GGUF\x03\x00\x00\x00", "GGUF file already"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_impostors_are_told_apart(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    text = refusal(tmp_path)
    assert told in text
    assert name in text


def test_no_regular_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path)
    (tmp_path / "model.safetensors").rmdir()
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for ever
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "model", ["no/such/folder", "nothing", "a" * 5000, "\0", "x/y.safetensors", "pyproject.toml"]
)
def test_a_path_that_is_no_model(model: str) -> None:
    refusal(ROOT / model if model == "pyproject.toml" else model, UsageError)


# --- the hub ---------------------------------------------------------------------------------------------

OPEN = """
import sys
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.errors import ConversionError
try:
    print(len(open_checkpoint(sys.argv[1]).shapes()))
except ConversionError as error:
    print(error)
"""


@pytest.mark.parametrize("form", FORMATS)
def test_a_cached_hub_model_opens_offline_through_its_links(tmp_path: Path, form: str) -> None:
    model = small(tmp_path / "model", shards=2, format=form)
    repository = tmp_path / "cache" / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, path in enumerate(sorted(model.iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    assert in_process(OPEN, "owner/name", **environment) == f"{len(tiny.tiny_shapes(SMALL))}\n"
    text = in_process(OPEN, "owner/other", **environment)
    assert "owner/other: is not in the local cache" in text
    assert "HF_HUB_OFFLINE" in text
    assert text.count("\n") == 1


def test_hub_failures_name_the_remedy() -> None:
    from huggingface_hub import errors

    def raised(kind: type[errors.HfHubHTTPError]) -> Exception:
        return kind.__new__(kind, "first line\nsecond line")

    cases: list[tuple[Exception, str]] = [
        (raised(errors.GatedRepoError), "hf auth login"),
        (raised(errors.RepositoryNotFoundError), "Check the spelling"),
        (errors.LocalEntryNotFoundError("no\nnetwork"), "Check the network"),
        (OSError("broken\npipe"), "Try again"),
    ]
    for error, hint in cases:
        text = str(hub_error(Repository("owner/name"), error))
        assert hint in text
        assert "\n" not in text


# --- quantized checkpoints and other types ---------------------------------------------------------------


def test_quantized_checkpoints_are_refused(tmp_path: Path) -> None:
    small(tmp_path)
    data = tiny.safetensors_bytes({"a.weight_scale_inv": np.zeros(4, np.float32)})
    (tmp_path / "model.safetensors").write_bytes(data)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed in (
        {**config, "quantization_config": {"quant_method": "fp8"}},
        {**config, "text_config": {"quantization_config": {"quant_method": "fp8"}}},
    ):
        tiny.write_json(tmp_path / "config.json", changed)
        text = refusal(tmp_path)
        assert "quantized already" in text
        assert "fp8" in text
    tiny.write_json(tmp_path / "config.json", {**config, "quantization_config": None})
    small(tmp_path)
    assert open_checkpoint(tmp_path).nbytes


@pytest.mark.parametrize("ending", ["qweight", "weight_scale_inv", "q_weight"])
def test_quantized_tensors_are_refused_by_name(tmp_path: Path, ending: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = tiny.safetensors_bytes({f"a.{ending}": np.zeros(4, np.float32)})
    (tmp_path / "model.safetensors").write_bytes(data)
    assert f"a.{ending}" in refusal(tmp_path)


@pytest.mark.skipif(not PEERS.exists(), reason=f"needs other tools' quantized models in {PEERS}")
@pytest.mark.parametrize("name", ["exl2_4.2bpw", "gptq_autoround_4b_g128", "gptq_gptqmodel_4b_g128"])
def test_other_tools_quantized_models_are_refused(name: str) -> None:
    assert "quantized already" in refusal(PEERS / name)


@pytest.mark.skipif(not PEERS.exists(), reason=f"needs the trained model in {PEERS}")
def test_a_model_that_transformers_saved() -> None:
    from safetensors.numpy import load_file

    checkpoint = open_checkpoint(PEERS / "tiny256")
    expected = load_file(PEERS / "tiny256" / "model.safetensors")
    assert set(checkpoint.shapes()) == set(expected)
    assert all(np.array_equal(checkpoint.tensors[name].data, value) for name, value in expected.items())


def _check_one(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.check_readable([name])


def _read_one(checkpoint: Checkpoint, name: str) -> None:
    checkpoint.rows(name, 0, 1)


def test_other_types_are_listed_and_refused_when_read(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    state = {
        "ids": torch.zeros(3, dtype=torch.int64),
        "fp8": torch.zeros(4).to(torch.float8_e4m3fn),
        "mask": torch.zeros(4, dtype=torch.bool),
    }
    for form in FORMATS:
        folder = tmp_path / form
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if form == "safetensors":
            save_file(state, folder / "model.safetensors")
        else:
            torch.save(state, folder / "pytorch_model.bin")
        checkpoint = open_checkpoint(folder)
        assert checkpoint.shapes() == {name: tuple(value.shape) for name, value in state.items()}
        assert checkpoint.dtype("fp8") == "f8_e4m3" if form == "safetensors" else "float8_e4m3fn"
        for name in state:
            for read in (partial(_read_one, checkpoint), checkpoint.float32, partial(_check_one, checkpoint)):
                with pytest.raises(CheckpointError, match=f"'{name}' is stored as .*save_pretrained"):
                    read(name)
    with pytest.raises(CheckpointError, match="holds no tensor 'other'"):
        checkpoint.rows("other", 0, 1)


# --- pytorch_model.bin -----------------------------------------------------------------------------------


def bin_folder(folder: Path, write: Callable[[Path], object]) -> Path:
    (folder / "config.json").write_text("{}")
    write(folder / "pytorch_model.bin")
    return folder


def test_an_old_pickle_is_refused_and_the_hint_works(tmp_path: Path) -> None:
    import torch

    values = torch.arange(6).float()
    bin_folder(tmp_path, lambda p: torch.save({"x": values}, p, _use_new_zipfile_serialization=False))
    path = tmp_path / "x'); import os; os.mkdir('ran') #$(mkdir ran) .bin"
    (tmp_path / "pytorch_model.bin").rename(path)
    text = refusal(path)
    assert "old PyTorch pickle" in text
    command = re.search(r"python (-c .*)\.", text)
    assert command is not None
    subprocess.run([sys.executable, *shlex.split(command[1])], cwd=tmp_path, check=True)
    assert not (tmp_path / "ran").exists()
    assert np.array_equal(open_checkpoint(path).tensors["x"].data, values.numpy())


class Evil:
    """A pickle of this creates a file when an unrestricted unpickler reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_file_that_runs_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    import torch

    mark = tmp_path / "ran"
    bin_folder(tmp_path, lambda p: torch.save({"x": torch.zeros(2), "y": Evil(mark)}, p))
    text = refusal(tmp_path)
    assert "would run code" in text
    assert "mkdir" in text
    assert not mark.exists()
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()  # the bait works


def test_a_file_that_holds_more_than_tensors(tmp_path: Path) -> None:
    import torch

    cases: list[tuple[object, str]] = [
        ({"epoch": 3, "x": torch.zeros(2)}, "'epoch' is a int"),
        ({"epoch": 3, "a": {"x": torch.zeros(2)}, "b": {"x": torch.zeros(2)}}, "'epoch' is a int"),
        ([torch.zeros(2)], "It holds a list"),
        ({}, "It holds a dict"),
        ({7: torch.zeros(2)}, "not a string"),
        ({"x": torch.zeros(2, 2).to_sparse()}, "not a plain dense tensor"),
    ]
    for state, told in cases:
        bin_folder(tmp_path, lambda p, state=state: torch.save(state, p))
        text = refusal(tmp_path)
        assert "is not a state dict" in text
        assert told in text


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    import torch

    bin_folder(tmp_path, lambda p: torch.save(torch.nn.Linear(2, 2), p))
    assert "would run code" in refusal(tmp_path)


def rezip(data: bytes, change: Callable[[str, bytes], bytes | None], compression: int) -> bytes:
    """The archive again with each member changed (None: left out)."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("told", "compression", "change"),
    [
        ("compressed", zipfile.ZIP_DEFLATED, lambda name, data: data),
        ("single data.pkl", zipfile.ZIP_STORED, lambda name, data: None if "data.pkl" in name else data),
        ("cannot load", zipfile.ZIP_STORED, lambda name, data: b"" if "data.pkl" in name else data),
        ("cannot load", zipfile.ZIP_STORED, lambda name, data: data[:20] if "data.pkl" in name else data),
        ("cannot load", zipfile.ZIP_STORED, lambda name, data: None if "/data/" in name else data),
        ("cannot load", zipfile.ZIP_STORED, lambda name, data: data[:2] if "/data/" in name else data),
        ("big-endian", zipfile.ZIP_STORED, lambda name, data: b"big" if "byteorder" in name else data),
    ],
)
def test_a_bin_with_a_wrong_member(
    tmp_path: Path, told: str, compression: int, change: Callable[[str, bytes], bytes | None]
) -> None:
    small(tmp_path, format="bin")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(rezip(path.read_bytes(), change, compression))
    assert told in refusal(tmp_path)


def test_a_truncated_bin_at_30_places(tmp_path: Path) -> None:
    small(tmp_path, format="bin")
    path = tmp_path / "pytorch_model.bin"
    data = path.read_bytes()
    for length in {*range(1, 12), *np.linspace(12, len(data) - 1, 20).astype(int).tolist()}:
        path.write_bytes(data[:length])
        assert "is damaged" in refusal(tmp_path), length
    path.write_bytes(data)
    assert open_checkpoint(tmp_path).nbytes
