"""--remote: the bytes that come from disk, no file on disk but the output, faults told or survived."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from hub_server import COMMIT, Fault, Hub, serving
from huggingface_hub import constants
from safetensors.numpy import save_file

from converters.gguf import write
from dsconvert.checkpoints import hub_listing, read_ahead, remote_model
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.locate import ModelPath
from dsconvert.cli import cli
from dsconvert.network import Patience
from dsconvert.proof import effort

SMALL = tiny.Tiny(layers=2, d=64, ff=160, heads=4, kv_heads=2, vocab=512)
NAME = "owner/name"
WEIGHTS = "model.safetensors"
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
REMOTE = (NAME, "--remote")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Place:
    """Folders `work` for outputs and `other` for all else that is written; a hub, and where it keeps weights.

    `folder` holds the same files on this disk, under the names of the hub's cache, which outputs take over.
    """

    def __init__(self, root: Path, stack: ExitStack, files: dict[str, bytes]) -> None:
        self.root, self.files, self.work = root, files, root / "work"
        self.storage = stack.enter_context(serving(Hub({NAME: files})))
        self.hub = stack.enter_context(serving(Hub({NAME: files}, storage=self.storage.url, token="secret")))
        self.folder = root / f"models--{NAME.replace('/', '--')}" / "snapshots" / COMMIT
        for name, body in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_bytes(body)

    def run(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(cli, list(map(str, arguments)))

    def left(self) -> list[str]:
        """Every file in the folders that a command may write to."""
        return sorted([*files_of(self.work), *files_of(self.root / "other")])

    def sent(self) -> int:
        """Bytes that both servers have sent."""
        return self.hub.sent + self.storage.sent

    def ranges(self) -> list[tuple[str, int, int]]:
        """What was asked of the weights: file, first byte, end."""
        asked = []
        for _, path, text in self.storage.asked:
            first, _, last = text.removeprefix("bytes=").partition("-")
            asked.append((path.rpartition("/")[2], int(first), int(last) + 1))
        return asked


Make = Callable[[Path], None]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Make], Place]]:
    """Serves the model that a function writes into a folder."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "other" / "cache"))
    monkeypatch.setattr(hub_listing, "Patience", partial(Patience, pause=0.01, tries=3))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    for name in ("work", "other"):
        (tmp_path / name).mkdir()
    with ExitStack() as stack:

        def place(make: Make) -> Place:
            make(tmp_path / "model")
            made = Place(tmp_path, stack, files_of(tmp_path / "model"))
            monkeypatch.setattr(constants, "ENDPOINT", made.hub.url)
            monkeypatch.setenv("HF_ENDPOINT", made.hub.url)
            return made

        yield place
    assert not remote_model.opened


def small(folder: Path, **changes: Any) -> None:
    tiny.tiny_checkpoint(folder, tiny.Tiny(**{**vars(SMALL), **changes}))


def in_float64(folder: Path) -> None:
    small(folder)
    exact = {name: value.astype(np.float64) for name, value in tiny.tiny_tensors(SMALL).items()}
    save_file(exact, folder / WEIGHTS)


def in_fp8(folder: Path) -> None:
    """A matrix in fp8 with its scales, as DeepSeek-V3 has them."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    small(folder)
    tensors = {name: torch.from_numpy(value) for name, value in tiny.tiny_tensors(SMALL).items()}
    name = "model.layers.0.mlp.up_proj.weight"  # [160, 64]
    tensors[name] = (tensors[name] * 100).to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = torch.tensor([[0.01], [0.012]])
    save_torch(tensors, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    tiny.write_json(folder / "config.json", {**config, "quantization_config": {"quant_method": "fp8"}})


@pytest.fixture
def place(serve: Callable[[Make], Place]) -> Place:
    return serve(small)


def said(result: Result, code: int = 2) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def fetched(result: Result) -> dict[str, Any]:
    events = [json.loads(line) for line in result.stdout.splitlines()]
    return next(event for event in events if event["event"] == "fetched")


# --- the same bytes --------------------------------------------------------------------------------------

FORMS: dict[str, Make] = {
    "bf16": small,
    "f16": partial(small, dtype="f16"),
    "f32": partial(small, dtype="f32", tied=True),
    "f64": in_float64,
    "fp8": in_fp8,
    "shards": partial(small, shards=3, bias=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_remote_model_gives_the_bytes_that_it_gives_from_disk(
    serve: Callable[[Make], Place], form: str
) -> None:
    place = serve(FORMS[form])
    common = ("-q", "q4_0,q8_0", "--effort", "off")
    assert place.run("gguf", place.folder, *common, "-o", place.root / "disk.gguf").exit_code == 0
    result = place.run("gguf", *REMOTE, *common, "-o", place.work / "out.gguf", "--json")
    assert result.exit_code == 0, result.output
    assert place.left() == ["out-q4_0.gguf", "out-q8_0.gguf"], "nothing but the outputs touches the disk"
    for quant in ("q4_0", "q8_0"):
        assert (place.work / f"out-{quant}.gguf").read_bytes() == (
            place.root / f"disk-{quant}.gguf"
        ).read_bytes()
    assert fetched(result)["nbytes"] == place.sent()
    assert set(place.storage.tokens) == {""}, "the token stays with the hub"


def test_gptq_folders_and_importance_are_those_from_disk(place: Place) -> None:
    common = ("--calib", "builtin", "--calib-samples", "2", "--calib-len", "32")
    for command, name in (("gptq", "folder"), ("imatrix", "im.gguf")):
        extra = ("--bits", "4", "--group-size", "32", "--effort", "off") if command == "gptq" else ()
        for model, out in (((place.folder,), place.root / name), (REMOTE, place.work / name)):
            result = place.run(command, *model, *extra, *common, "-o", out)
            assert result.exit_code == 0, result.output
    assert files_of(place.work / "folder") == files_of(place.root / "folder")
    assert (place.work / "im.gguf").read_bytes() == (place.root / "im.gguf").read_bytes()
    assert not files_of(place.root / "other")


def test_big_tensors_are_read_in_blocks_and_each_block_once(
    serve: Callable[[Make], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "CHUNK", 2 << 10)  # values, twice as many bytes
    monkeypatch.setattr(read_ahead, "BLOCK", 8 << 10)
    monkeypatch.setattr(read_ahead, "FEW", 4 << 10)
    monkeypatch.setattr(remote_model, "HEAD", 4 << 10)
    place = serve(small)
    result = place.run("gguf", *REMOTE, "--effort", "off", "-o", place.work / "out.gguf")
    assert result.exit_code == 0, result.output
    asked = [(first, end) for _, first, end in place.ranges()]
    assert len([first for first, end in asked if end - first == 8 << 10]) > 20, "blocks"
    times = np.zeros(len(place.files[WEIGHTS]), int)
    for first, end in asked:
        times[first:end] += 1
    assert times.min() == 1
    known_by = 21 * 320 + 4 * 2048  # a row of each tensor, or a head's, tells what the model is
    assert (times - 1).sum() <= known_by


# --- the proof -------------------------------------------------------------------------------------------


def test_a_quick_proof_reads_the_rows_and_blocks_that_it_samples(
    serve: Callable[[Make], Place], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "QUICK_SECONDS", 0.0)  # as for a big model
    monkeypatch.setattr(remote_model, "HEAD", 4 << 10)
    place = serve(partial(small, layers=8))
    out = place.root / "out.gguf"
    assert place.run("gguf", place.folder, "-q", "q8_0", "--effort", "off", "-o", out).exit_code == 0
    result = place.run("verify", out, "--against", NAME, "--remote", "--effort", "quick")
    assert "of 8 on 32 tokens" in said(result, code=0)
    read = sum(end - first for _, first, end in place.ranges())
    assert read < len(place.files[WEIGHTS]) / 2
    assert not place.left()


def test_compare_takes_a_remote_reference(place: Place) -> None:
    out = place.root / "out.gguf"
    assert place.run("gguf", place.folder, "-q", "q8_0", "--effort", "off", "-o", out).exit_code == 0
    result = place.run("compare", out, "--against", f"{place.hub.url}/{NAME}", "--remote")
    assert f"{NAME}: read " in said(result, code=0)


# --- faults ----------------------------------------------------------------------------------------------


def test_a_conversion_survives_what_a_network_does(serve: Callable[[Make], Place]) -> None:
    place = serve(partial(small, shards=3))
    assert place.run("gguf", place.folder, "--effort", "off", "-o", place.root / "disk.gguf").exit_code == 0
    busy = Fault(status=429, headers={"Retry-After": "0"})
    place.storage.faults = {
        SHARDS[0]: [Fault(cut=100), Fault(status=503)],
        SHARDS[1]: [None, None, Fault(status=403), Fault(cut=0)],  # the address has run out
        SHARDS[2]: [busy, busy],
    }
    place.hub.faults = {"config.json": [Fault(cut=7)], "tokenizer.json": [busy]}
    result = place.run("gguf", *REMOTE, "--effort", "off", "-o", place.work / "out.gguf")
    assert result.exit_code == 0, result.output
    assert "asked for anew" in result.output
    assert (place.work / "out.gguf").read_bytes() == (place.root / "disk.gguf").read_bytes()


LATE = [None] * 6
STOPPED: dict[str, tuple[list[Fault | None], str]] = {
    "wrong range": (
        [*LATE, Fault(headers={"Content-Range": "bytes 0-1/2"})],
        "has changed while it was read",
    ),
    "no ranges": ([*LATE, Fault(whole=True)], "status 200 in place of 206"),
    "changed": ([*LATE, Fault(headers={"ETag": '"other"'})], "Its etag was"),
    "cut for good": ([*LATE, *[Fault(cut=0)] * 9], "tried 3 times. Check the network"),
    "gone": ([*LATE, *[Fault(status=404)] * 9], "status 404"),
    "torn": ([Fault(body=b"x" * 1000)], "has changed"),
}


@pytest.mark.parametrize("case", STOPPED)
def test_what_cannot_be_read_is_told_and_leaves_nothing(place: Place, case: str) -> None:
    place.storage.faults[WEIGHTS], text = STOPPED[case]
    result = place.run("gguf", *REMOTE, "--effort", "off", "-o", place.work / "out.gguf")
    assert text in said(result)
    assert f"error: {NAME}/{WEIGHTS}: " in result.output
    assert not place.left()


def test_a_repository_that_changes_before_the_end_is_refused(place: Place) -> None:
    class Later(dict[str, list[Fault | None]]):
        def get(self, name: str, default: Any = None) -> Any:
            if name == WEIGHTS and len(place.storage.asked) > 5:
                place.files["README.md"] = b"new"
            return super().get(name, default)

    place.storage.faults = Later()
    result = place.run("gguf", *REMOTE, "--effort", "off", "-o", place.work / "out.gguf")
    assert f"{NAME}@{COMMIT}: has changed while it was read" in said(result)
    assert not place.left()


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (401, "GatedRepo", "is gated"),
        (401, "RepoNotFound", "run `hf auth login`"),
        (404, "RevisionNotFound", "has no such revision"),
        (403, "", "may not be read"),
        (503, "", "status 503; tried 3 times"),
    ],
)
def test_a_refusal_of_the_hub_is_told(place: Place, status: int, code: str, text: str) -> None:
    place.hub.status, place.hub.code = {"revision/v1": status}, code
    result = place.run("gguf", f"{NAME}@v1", "--remote", "--dry-run")
    assert text in said(result)
    assert result.output.startswith(f"error: {NAME}@v1: ")


def test_errors_name_the_repository_and_not_the_folder_that_is_gone(serve: Callable[[Make], Place]) -> None:
    def damaged(folder: Path) -> None:
        small(folder)
        (folder / "config.json").write_text("{")

    result = serve(damaged).run("gguf", *REMOTE, "--dry-run")
    assert f"error: {NAME}/config.json: cannot be read as JSON" in said(result)


# --- what is asked for -----------------------------------------------------------------------------------


def test_a_dry_run_reads_headers_only(place: Place) -> None:
    result = place.run("gguf", *REMOTE, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert fetched(result)["again"] == 0
    assert not place.left()
    assert all(end - first <= remote_model.HEAD for _, first, end in place.ranges())


def test_memory_reads_no_weights_of_a_model_on_the_hub(place: Place) -> None:
    result = place.run("memory", NAME, "--types", "q8_0", "--seq", "256", "--json")
    assert result.exit_code == 0, result.output
    here = place.run("memory", place.folder, "--types", "q8_0", "--seq", "256", "--json")
    remote, local = (json.loads(r.stdout.splitlines()[0]) for r in (result, here))
    for found in (remote, local):
        for row in found["rows"]:
            del row["command"]  # it names the model
    assert remote["rows"] == local["rows"]
    assert not place.storage.asked
    assert not place.left()


def test_a_revision_is_named_in_either_way(place: Place) -> None:
    for model in ((f"{NAME}@v1",), (NAME, "--revision", "v1"), (f"{place.hub.url}/{NAME}/tree/v1",)):
        assert place.run("gguf", *model, "--remote", "--dry-run").exit_code == 0
        assert place.hub.asked[0][1] == f"api/models/{NAME}/revision/v1"
        assert place.hub.asked[1][1].startswith(f"{NAME}/resolve/{COMMIT}/")
        place.hub.asked.clear()
    both = place.run("gguf", f"{NAME}@v1", "--revision", "v2", "--remote", "--dry-run")
    assert "MODEL_PATH names 'v1', --revision 'v2'" in said(both)


@pytest.mark.parametrize("option", [("--remote",), ("--revision", "v1"), ("--cache-dir", "x")])
def test_options_on_the_hub_are_for_models_on_the_hub(option: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, ["gguf", "sample:", "--dry-run", *option])
    assert f"{option[0]} is for models on the hub" in said(result)


def test_remote_and_a_cache_contradict_each_other(place: Place) -> None:
    result = place.run("gguf", *REMOTE, "--cache-dir", place.work, "--dry-run")
    assert "--cache-dir has no effect with --remote" in said(result)


def test_remote_needs_a_network(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in said(place.run("gguf", *REMOTE, "--dry-run"))


def test_bin_files_are_not_read_over_the_network(serve: Callable[[Make], Place]) -> None:
    result = serve(partial(small, format="bin")).run("gguf", *REMOTE, "--dry-run")
    assert f"{NAME}/pytorch_model.bin: is not read over the network" in said(result)


def test_the_room_that_is_asked_for_is_the_outputs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    out = place.work / "out.gguf"
    planned = json.loads(place.run("gguf", *REMOTE, "--dry-run", "--json").stdout.splitlines()[0])
    usage = shutil.disk_usage(place.work)
    for free, code in ((planned["nbytes"][0], 0), (planned["nbytes"][0] - 1, 2)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        result = place.run("gguf", *REMOTE, "--effort", "off", "--force", "-o", out)
        assert result.exit_code == code, result.output


def test_a_mirror_that_states_no_sizes_is_for_downloads(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hub_server._Handler.siblings", lambda self, files: [{"rfilename": n} for n in files])
    text = said(place.run("gguf", *REMOTE, "--dry-run"))
    assert "127.0.0.1" in text
    assert "does not say how big it is. Leave --remote out" in text


def test_a_file_of_a_strange_name_is_not_written(place: Place) -> None:
    place.files["../../../../../x.json"] = b"{}"
    place.files["additional_chat_templates/../../x.jinja"] = b"{}"
    assert place.run("gguf", *REMOTE, "--dry-run").exit_code == 0
    assert not place.left()
    assert not any("x.j" in path for _, path, _ in place.hub.asked)


def test_a_checkpoint_of_the_library_closes_itself(place: Place) -> None:
    checkpoint = open_checkpoint(ModelPath(NAME, remote=True))
    assert checkpoint.float32("model.norm.weight").shape == (64,)
    assert checkpoint.rows("lm_head.weight", 3, 5).shape == (2, 64)
    assert checkpoint.folder.is_dir()
    remote_model.opened.pop().close()
    assert not place.left()
