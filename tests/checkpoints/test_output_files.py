"""No foreign file is harmed: attacks and accidents on what a command writes, from the command line.

Each test says what stood there before, and that it stands there still, byte for byte.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from dsconvert.cli import cli

SMALL = ("--calib", "builtin", "--calib-samples", "2", "--calib-len", "64")
GPTQ = ("gptq", *SMALL, "--group-size", "32", "--effort", "off")
EXL2 = ("exl2", *SMALL, "--bpw", "6", "--effort", "off")
IMATRIX = ("imatrix", *SMALL)
GGUF = ("gguf", "--effort", "off")


def run(*arguments: object) -> Result:
    """A command of the tool."""
    return CliRunner().invoke(cli, [str(one) for one in arguments])


def refused(*arguments: object) -> str:
    """The message of a command that stops."""
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert "unexpected" not in done.output
    return " ".join(done.stderr.split())


def done(*arguments: object) -> Result:
    """A command that succeeds."""
    found = run(*arguments)
    assert found.exit_code == 0, found.output
    return found


def tree(folder: Path) -> dict[str, str]:
    """Everything below a folder: files by their digest, links by where they lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.tiny_checkpoint(tmp_path / "model", d=128, ff=160, layers=1)


@pytest.fixture
def diary(tmp_path: Path) -> Path:
    """A folder of the user's."""
    folder = tmp_path / "mine"
    (folder / "deep").mkdir(parents=True)
    (folder / "diary.txt").write_text("dear diary")
    (folder / "deep" / "thesis.txt").write_text("chapter one")
    return folder


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Root gives up what lets it read and write whatever it likes (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH)."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~0b110
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


class TestFoldersUnderOurNames:
    """`OUT.part`, `OUT.state` and their kin, when they are not ours."""

    @pytest.mark.parametrize("suffix", [".part", ".part-replaced", ".state"])
    @pytest.mark.parametrize("command", [GPTQ, EXL2], ids=["gptq", "exl2"])
    def test_a_link_is_not_followed(
        self, model: Path, diary: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], suffix: str
    ) -> None:
        name = "model-gptq-4bit-32g" if command is GPTQ else "model-exl2-6.0bpw"
        (model / (name + suffix)).symlink_to(os.path.relpath(diary, model))
        before = tree(model.parent)
        monkeypatch.chdir(model)
        said = refused(*command)
        assert name + suffix in said
        assert tree(model.parent) == before
        refused(*command, "--force")
        refused(*command, "--resume")
        assert tree(model.parent) == before

    @pytest.mark.parametrize("suffix", [".part", ".part-replaced", ".state"])
    @pytest.mark.parametrize("command", [GPTQ, EXL2], ids=["gptq", "exl2"])
    def test_own_folders_stay(
        self, model: Path, diary: Path, tmp_path: Path, command: tuple[str, ...], suffix: str
    ) -> None:
        diary.rename(tmp_path / f"out{suffix}")
        before = tree(tmp_path)
        for more in ((), ("--force",), ("--resume",), ("--resume", "--force")):
            said = refused(*command, model, "-o", tmp_path / "out", *more)
            assert "was not made by dsconvert" in said
        assert tree(tmp_path) == before

    def test_a_work_folder_of_exllamav2_is_looked_at_too(
        self, model: Path, diary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from converters.exl2 import backend

        monkeypatch.setattr(backend, "check_installed", lambda: None)
        monkeypatch.setattr(backend, "check_readable", lambda job: None)
        diary.rename(tmp_path / "out.work")
        before = tree(tmp_path)
        said = refused("exl2", model, "-o", tmp_path / "out", "--backend", "exllamav2", "--force")
        assert "was not made by dsconvert" in said
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("more", [(), ("--force",), ("--resume",)], ids=["plain", "force", "resume"])
    def test_a_folder_with_a_job_json_of_another_program_stays(
        self, model: Path, tmp_path: Path, more: tuple[str, ...]
    ) -> None:
        state = tmp_path / "out.state"
        state.mkdir()
        (state / "job.json").write_text('{"name": "nightly backup"}')
        (state / "block-00000.json").write_text("{}")
        before = tree(tmp_path)
        refused(*GPTQ, model, "-o", tmp_path / "out", *more)
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("more", [(), ("--force",), ("--resume",)], ids=["plain", "force", "resume"])
    def test_what_somebody_put_into_a_state_of_ours_stays(
        self, model: Path, tmp_path: Path, more: tuple[str, ...]
    ) -> None:
        from dsconvert.checkpoints.marked_folders import mark

        state = tmp_path / "out.state"
        state.mkdir()
        mark(state, "state")
        (state / "notes.txt").write_text("mine")
        before = tree(tmp_path)
        assert "notes.txt" in refused(*GPTQ, model, "-o", tmp_path / "out", *more)
        assert tree(tmp_path) == before

    def test_empty_folders_are_taken_and_no_marker_is_published(self, model: Path, tmp_path: Path) -> None:
        for name in ("out", "out.part", "out.state", "out.part-replaced"):
            (tmp_path / name).mkdir()
        done(*GPTQ, model, "-o", tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
        assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]
        done(*GPTQ, model, "-o", tmp_path / "out", "--force")
        assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
        assert not [path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]

    def test_links_in_a_part_of_ours_are_removed_and_not_followed(
        self, model: Path, diary: Path, tmp_path: Path
    ) -> None:
        from dsconvert.checkpoints.marked_folders import mark

        part = tmp_path / "out.part"
        part.mkdir()
        mark(part, "part")
        (part / "vision").symlink_to(diary)
        (part / "config.json").symlink_to(diary / "diary.txt")
        before = tree(diary)
        done(*GPTQ, model, "-o", tmp_path / "out")
        assert tree(diary) == before

    def test_a_marker_that_is_a_link_is_none(self, model: Path, diary: Path, tmp_path: Path) -> None:
        part = tmp_path / "out.part"
        part.mkdir()
        (diary / "marker").write_text('{"dsconvert": "part"}')
        (part / ".dsconvert").symlink_to(diary / "marker")
        before = tree(tmp_path)
        refused(*GPTQ, model, "-o", tmp_path / "out", "--force")
        assert tree(tmp_path) == before


class TestOutputsThatAreInputs:
    """Whatever --force says, nothing that a command reads is replaced or emptied."""

    @pytest.mark.parametrize("command", [GPTQ, EXL2], ids=["gptq", "exl2"])
    @pytest.mark.parametrize("how", ["itself", "link", "parent", "dotted", "from inside"])
    def test_a_folder(
        self,
        model: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        command: tuple[str, ...],
        how: str,
    ) -> None:
        (tmp_path / "link").symlink_to(model)
        (tmp_path / "config.json").write_text("{}")  # so that the parent looks like a model
        monkeypatch.chdir(model)
        arguments: dict[str, tuple[object, ...]] = {
            "itself": (model, "-o", model),
            "link": (tmp_path / "link", "-o", model),
            "parent": (model, "-o", tmp_path),
            "dotted": (model, "-o", model / ".." / "model"),
            "from inside": ("-o", model),
        }
        before = tree(tmp_path)
        said = refused(*command, *arguments[how], "--force")
        assert "is, or holds, what this command reads" in said
        assert tree(tmp_path) == before

    def test_a_calibration_folder_or_file_is_an_input(self, model: Path, tmp_path: Path) -> None:
        texts = tmp_path / "texts"
        texts.mkdir()
        (texts / "config.json").write_text("{}")
        (texts / "a.txt").write_text("word " * 2000)
        before = tree(tmp_path)
        options = ("--calib-samples", "2", "--calib-len", "64", "--group-size", "32", "--force")
        for calib in (texts, texts / "a.txt"):
            said = refused("gptq", model, "--calib", calib, *options, "-o", texts)
            assert "what this command reads" in said
        assert "reads" in refused(
            "imatrix", model, "--calib", texts / "a.txt", "-o", texts / "a.txt", "--force"
        )
        assert "reads" in refused("imatrix", model, "--calib", texts, "-o", texts / "a.txt", "--force")
        chat = tmp_path / "chat.jsonl"
        chat.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
        assert "reads" in refused("imatrix", model, "--calib-chat", chat, "-o", chat, "--force")
        assert {name: digest for name, digest in tree(tmp_path).items() if name != "chat.jsonl"} == before

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
    @pytest.mark.parametrize("how", ["itself", "hard link", "link to the folder", "weight file given"])
    def test_a_file_of_the_checkpoint(self, model: Path, tmp_path: Path, name: str, how: str) -> None:
        os.link(model / name, tmp_path / "hard")
        (tmp_path / "link").symlink_to(model)
        given = {"weight file given": model / "model.safetensors"}.get(how, model)
        target = {"hard link": tmp_path / "hard", "link to the folder": tmp_path / "link" / name}
        before = tree(tmp_path)
        said = refused(*IMATRIX, given, "-o", target.get(how, model / name), "--force")
        assert "is a file that this command reads" in said
        assert tree(tmp_path) == before

    def test_an_importance_matrix(self, model: Path, tmp_path: Path) -> None:
        matrix = tmp_path / "i.gguf"
        done(*IMATRIX, model, "-o", matrix)
        os.link(matrix, tmp_path / "hard.gguf")
        before = tree(tmp_path)
        for target in (matrix, tmp_path / "hard.gguf"):
            said = refused(*GGUF, model, "--imatrix", matrix, "-o", target, "--force")
            assert "is a file that this command reads" in said
        assert tree(tmp_path) == before

    def test_the_part_of_an_output_is_one_too(self, model: Path, tmp_path: Path) -> None:
        calib = tmp_path / "i.gguf.part"
        calib.write_text("word " * 2000)
        before = tree(tmp_path)
        options = ("--calib-samples", "2", "--calib-len", "64")
        said = refused("imatrix", model, "--calib", calib, *options, "-o", tmp_path / "i.gguf", "--force")
        assert "i.gguf.part" in said
        assert tree(tmp_path) == before

    def test_new_files_in_the_model_folder_are_normal(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(model)
        before = tree(model)
        done(*GGUF)
        done(*IMATRIX)
        done(*GGUF, "--imatrix", "imatrix.gguf", "--force")  # over the first one, which is no input
        done(*GPTQ)
        done(*GPTQ, "--force")
        made = {"model-q4_0.gguf", "imatrix.gguf", "model-gptq-4bit-32g"}
        assert {name: tree(model)[name] for name in before} == before
        assert {path.name for path in model.iterdir()} == set(before) | made

    def test_two_outputs_of_one_command(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out.gguf"
        done(*GGUF, model, "-o", out)
        before = tree(tmp_path)
        one = tmp_path / "one.json"
        asked = ("verify", out, "--against", model, "--windows", "1", "--length", "64")
        assert "two outputs" in refused(*asked, "--report", one, "--json", tmp_path / "model/../one.json")
        part = tmp_path / "one.json.part"
        assert "two outputs" in refused(*asked, "--report", part, "--json", one)
        assert json.loads(one.read_text())["event"] == "error"  # as JSON, where the user asked for JSON
        one.unlink()
        assert "two outputs" in refused(*asked, "--report", one, "--kld-base", one)
        assert tree(tmp_path) == before


class TestSideFiles:
    """Reports, their JSON, a file of base log-probabilities, a measurement."""

    @pytest.fixture
    def out(self, model: Path, tmp_path: Path) -> Path:
        done(*GGUF, model, "-o", tmp_path / "o.gguf")
        return tmp_path / "o.gguf"

    @pytest.mark.parametrize("command", ["verify", "compare"])
    @pytest.mark.parametrize("option", ["--report", "--json"])
    def test_only_its_own_kind_is_overwritten(
        self, model: Path, out: Path, tmp_path: Path, command: str, option: str
    ) -> None:
        (tmp_path / "page.html").write_text("<html>my page</html>")
        (tmp_path / "link").symlink_to(out)
        os.link(model / "config.json", tmp_path / "hard.json")
        before = tree(tmp_path)
        asked = (command, out, "--against", model, "--windows", "1", "--length", "64")
        targets = (out, model / "model.safetensors", model / "config.json", model / "tokenizer.json")
        for target in (*targets, tmp_path / "page.html", tmp_path / "link", tmp_path / "hard.json", model):
            refused(*asked, option, target)
        assert tree(tmp_path) == before

    def test_a_report_replaces_a_report(self, model: Path, out: Path, tmp_path: Path) -> None:
        page, found = tmp_path / "r.html", tmp_path / "r.json"
        asked = ("verify", out, "--against", model, "--windows", "1", "--length", "64")
        for command in (asked, ("compare", *asked[1:]), asked):
            run(*command, "--report", page, "--json", found)
            assert json.loads(found.read_text())["title"]
            assert page.read_text().startswith("<!doctype html>")
        assert not list(tmp_path.glob("*.part"))

    @pytest.mark.parametrize("option", ["--report", "--json"])
    def test_the_part_is_no_link(self, model: Path, out: Path, tmp_path: Path, option: str) -> None:
        (tmp_path / "target.txt").write_text("mine")
        (tmp_path / "r.json.part").symlink_to(tmp_path / "target.txt")
        before = tree(tmp_path)
        asked = ("verify", out, "--against", model, "--windows", "1", "--length", "64")
        assert "r.json.part" in refused(*asked, option, tmp_path / "r.json")
        assert tree(tmp_path) == before

    @pytest.mark.parametrize("option", ["--report", "--json", "--kld-base"])
    def test_a_place_that_cannot_be_written_is_said_before_any_work(
        self, model: Path, out: Path, tmp_path: Path, option: str
    ) -> None:
        asked = ("verify", out, "--against", model, "--windows", "1", "--length", "64")
        name = "r.json" if option == "--json" else "r"
        assert "mkdir -p" in refused(*asked, option, tmp_path / "none" / name)
        assert "verifying" not in refused(*asked, option, tmp_path / "none" / name)
        assert "bytes too long" in refused(*asked, option, tmp_path / ("r" * 250 + name))
        assert "is a file, not a folder" in refused(*asked, option, out / name)

    def test_nothing_that_exists_is_taken_for_log_probabilities(
        self, model: Path, out: Path, tmp_path: Path
    ) -> None:
        before = tree(tmp_path)
        asked = ("verify", out, "--against", model, "--windows", "1", "--length", "64")
        refused(*asked, "--kld-base", model / "model.safetensors")
        (tmp_path / "k.part").symlink_to(out)
        refused(*asked, "--kld-base", tmp_path / "k")
        (tmp_path / "k.part").unlink()
        assert tree(tmp_path) == before

    def test_a_measurement_takes_nobodys_place(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        (tmp_path / "m.json.part").symlink_to(model / "config.json")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("{}")
        before = tree(tmp_path)
        for path in (model / "config.json", tmp_path / "link", tmp_path / "m.json", tmp_path / "out" / "m"):
            refused(*EXL2, model, "-o", tmp_path / "out", "--force", "--measurement", path)
        assert tree(tmp_path) == before


class TestForce:
    """What --force may replace."""

    def test_a_model_folder_that_holds_more_stays(self, model: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        done(*GPTQ, model, "-o", out)
        for name in (".git/HEAD", "thesis.docx", "vision/photo.jpg", "notes/a.txt"):
            path = out / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
            before = tree(tmp_path)
            assert "holds more than a model" in refused(*GPTQ, model, "-o", out, "--force")
            assert tree(tmp_path) == before
            path.unlink()
            if path.parent != out:
                path.parent.rmdir()
        done(*GPTQ, model, "-o", out, "--force")

    @pytest.mark.parametrize("command", [GPTQ, GGUF], ids=["gptq", "gguf"])
    def test_a_link_is_not_replaced(self, model: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
        done(*command, model, "-o", tmp_path / "real.gguf")
        (tmp_path / "link.gguf").symlink_to("real.gguf")
        before = tree(tmp_path)
        assert "is a link" in refused(*command, model, "-o", tmp_path / "link.gguf", "--force")
        assert tree(tmp_path) == before

    def test_special_files_are_no_outputs(self, model: Path, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.gguf")
        os.mkfifo(tmp_path / "out.gguf.part")
        assert "is not a regular file" in refused(*GGUF, model, "-o", tmp_path / "pipe.gguf", "--force")
        assert "was not made by dsconvert" in refused(*GGUF, model, "-o", tmp_path / "out.gguf")

    def test_a_download_under_the_name_of_a_part_stays(self, model: Path, tmp_path: Path) -> None:
        part = tmp_path / "out.gguf.part"
        part.write_bytes(b"GGUF" + bytes(1000))
        before = tree(tmp_path)
        assert "was not made by dsconvert" in refused(*GGUF, model, "-o", tmp_path / "out.gguf", "--force")
        assert tree(tmp_path) == before


class TestLinksOutOfTheModel:
    """What is copied into an output comes from the model's own folder, or from the hub's cache of it."""

    @pytest.mark.parametrize(
        "name",
        ["LICENSE-x", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "README.md"],
    )
    def test_a_secret_is_not_published(self, model: Path, tmp_path: Path, name: str) -> None:
        secret = tmp_path / "id_ed25519"
        secret.write_text("{}")
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to("../id_ed25519")
        said = refused(*GPTQ, model, "-o", tmp_path / "out")
        assert "leads out of the model folder" in said
        assert name in said
        if name == "LICENSE-x":  # not read at all
            done(*GGUF, model, "-o", tmp_path / "out.gguf")
        else:
            assert "leads out of the model folder" in refused(*GGUF, model, "-o", tmp_path / "out.gguf")

    def test_a_template_in_a_linked_folder(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "rag.jinja").write_text("secret")
        (model / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
        assert "rag.jinja" in refused(*GGUF, model, "-o", tmp_path / "out.gguf")

    def test_the_hubs_cache_is_made_of_links(self, model: Path, tmp_path: Path) -> None:
        root = tmp_path / "models--org--name"
        snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
        snapshot.mkdir(parents=True)
        blobs.mkdir()
        (model / "LICENSE").write_text("free")
        for number, path in enumerate(sorted(model.iterdir())):
            path.rename(blobs / f"{number}")
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        done(*GPTQ, snapshot, "-o", tmp_path / "out")
        assert (tmp_path / "out" / "LICENSE").read_text() == "free"
        assert not (tmp_path / "out" / "LICENSE").is_symlink()
        done(*GGUF, snapshot, "-o", tmp_path / "out.gguf")
        before = tree(tmp_path)
        refused(*IMATRIX, snapshot, "-o", blobs / "0", "--force")
        assert tree(tmp_path) == before


class TestPlaces:
    """Where an output cannot be, said in plain words before any work."""

    @pytest.mark.parametrize("command", [GGUF, GPTQ, EXL2, IMATRIX], ids=["gguf", "gptq", "exl2", "imatrix"])
    def test_names_and_parents(self, model: Path, tmp_path: Path, command: tuple[str, ...]) -> None:
        long = "x" * 249 + ".gguf"
        assert "bytes too long" in refused(*command, model, "-o", tmp_path / long)
        assert "bytes too long" in refused(*command, model, "-o", tmp_path / ("é" * 124 + ".gguf"))
        assert "mkdir -p" in refused(*command, model, "-o", tmp_path / "no" / "out.gguf")
        assert "is a file, not a folder" in refused(*command, model, "-o", model / "config.json" / "out.gguf")
        if command in (GPTQ, EXL2):
            for path in ("/", "..", tmp_path / ".."):
                assert "cannot be the name of an output" in refused(*command, model, "-o", path, "--force")

    @pytest.mark.parametrize("command", [GGUF, GPTQ, EXL2, IMATRIX], ids=["gguf", "gptq", "exl2", "imatrix"])
    def test_a_folder_that_one_may_not_enter_or_write(self, locked: Path, command: tuple[str, ...]) -> None:
        model, closed, sealed = locked / "model", locked / "closed", locked / "sealed"
        assert "cannot be looked at" in refused(*command, model, "-o", closed / "in" / "out.gguf")
        assert "may not be written" in refused(*command, model, "-o", closed / "out.gguf")
        assert "may not be written" in refused(*command, model, "-o", sealed / "out.gguf")

    def test_inputs_in_a_folder_that_one_may_not_enter(self, locked: Path) -> None:
        model, inside = locked / "model", locked / "closed" / "in"
        for arguments in (
            (*GGUF, inside / "m"),
            (*GGUF, model, "--imatrix", inside / "i.gguf", "-o", locked / "x.gguf"),
            (*GGUF, model, "--calib-chat", inside / "c.jsonl", "-o", locked / "x.gguf"),
            (*EXL2, model, "--measurement", inside / "m.json"),
            (*GPTQ, inside / "m"),
            (*GGUF, locked / "closed"),
            (*GPTQ, locked / "closed"),
            ("verify", locked / "closed", "--against", model),
            ("tokenizer", locked / "closed"),
            ("gptq", model, "--calib", locked / "closed", "-o", locked / "x"),
            ("gptq", model, "--calib", inside / "c.txt", "-o", locked / "x"),
            ("inspect", inside / "x.gguf"),
            ("tokenizer", inside / "x.gguf"),
            ("tokenizer", inside / "tokenizer.json"),
            ("tokenizer", model, "--compare", inside / "m"),
            ("compare", inside / "x.gguf", "--against", model),
            ("verify", model, "--against", model, "--text", inside / "t.txt"),
            ("verify", inside / "x.gguf", "--against", model),
            ("verify", model, "--against", inside / "m"),
            ("verify", model, "--against", model, "--kld-base", inside / "k"),
            ("verify", model, "--against", model, "--mmproj", inside / "p.gguf"),
        ):
            refused(*arguments)

    def test_a_licence_that_may_not_be_read_is_said_before_the_work(self, locked: Path) -> None:
        said = refused(*GPTQ, locked / "unreadable", "-o", locked / "out")
        assert "LICENSE: cannot be read" in said
        assert "drawing" not in said

    @pytest.fixture
    def locked(self) -> Iterator[Path]:
        """Folders and a file without permissions, as a user meets them who is not root."""
        folder = Path(tempfile.mkdtemp())
        try:
            tiny.tiny_checkpoint(folder / "model", d=128, ff=160, layers=1)
            shutil.copytree(folder / "model", folder / "unreadable")
            (folder / "unreadable" / "LICENSE").write_text("free")
            for name, mode in (("closed", 0o600), ("sealed", 0o555)):
                (folder / name).mkdir()
                (folder / name).chmod(mode)
            (folder / "unreadable" / "LICENSE").chmod(0)
            with obeying_permissions():
                yield folder
        finally:
            (folder / "closed").chmod(0o700)
            shutil.rmtree(folder)

    def test_a_limit_on_the_size_of_files(self, model: Path, tmp_path: Path) -> None:
        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

        command = [sys.executable, "-m", "dsconvert", *GGUF, str(model), "-o", str(tmp_path / "o.gguf")]
        found = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)
        assert found.returncode == 2
        assert "--split-max-size" in found.stderr
        assert not list(tmp_path.glob("o.gguf*"))


FIRST_RENAME_KILLS = """
import os, sys
from pathlib import Path
from dsconvert.checkpoints import output_files
names = sys.argv[1:]
real = os.replace
def replace(a, b):
    real(a, b)
    os._exit(9)
output_files.os.replace = replace
paths = [Path(name) for name in names]
with output_files.part_files(paths, [3] * len(paths), force=False) as parts:
    for part in parts:
        part.write(b"new", 0)
"""


NTH_RENAME_KILLS = """
import os, sys
from pathlib import Path
from dsconvert.checkpoints import marked_folders
out, left, after = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "after"
real = os.replace
def replace(a, b):
    global left
    left -= 1
    if left == 0 and not after:
        os._exit(9)
    real(a, b)
    if left == 0:
        os._exit(9)
marked_folders.os.replace = replace
with marked_folders.model_folder(out, 3, force=True) as part:
    (part / "config.json").write_text("new")
"""


class TestKilledPublications:
    """A kill between the renames of a set of files."""

    def test_the_next_run_goes_over_what_was_published(self, tmp_path: Path) -> None:
        from dsconvert.checkpoints.output_files import part_files
        from dsconvert.errors import OutputError

        names = [tmp_path / f"m-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        command = [sys.executable, "-c", FIRST_RENAME_KILLS, *map(str, names)]
        assert subprocess.run(command, check=False).returncode == 9
        assert [name.exists() for name in names] == [False, False, True]
        with part_files(names, [5] * 3, force=False) as parts:
            for part in parts:
                part.write(b"whole", 0)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
            name.name: b"whole" for name in names
        }
        with pytest.raises(OutputError, match="exists already"), part_files(names, [5] * 3, force=False):
            pass

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("number", [1, 2])
    def test_a_folder_that_is_replaced(self, tmp_path: Path, number: int, when: str) -> None:
        """Whenever it is killed, the old or the new model is there whole, and the next run leaves one."""
        from dsconvert.checkpoints.marked_folders import model_folder

        out = tmp_path / "out"
        out.mkdir()
        (out / "config.json").write_text("old")
        command = [sys.executable, "-c", NTH_RENAME_KILLS, str(out), str(number), when]
        assert subprocess.run(command, check=False).returncode == 9
        whole = {path.read_text() for path in tmp_path.glob("*/config.json")}
        assert "old" in whole
        with model_folder(out, 3, force=out.exists()) as part:
            (part / "config.json").write_text("next")
        assert {path.name: tree(path) for path in tmp_path.iterdir()} == {
            "out": {"config.json": hashlib.sha256(b"next").hexdigest()}
        }

    def test_a_file_of_another_run_is_not_taken_for_one(self, tmp_path: Path) -> None:
        """A part that was only begun does not make what stands beside it a leftover."""
        from dsconvert.checkpoints.output_files import part_files
        from dsconvert.checkpoints.output_plan import UNFINISHED
        from dsconvert.errors import OutputError

        first, second = tmp_path / "m-q4_0.gguf", tmp_path / "m-q8_0.gguf"
        second.write_bytes(b"of last week")
        (tmp_path / "m-q4_0.gguf.part").write_bytes(b"half" + UNFINISHED)
        with pytest.raises(OutputError, match="exists already"), part_files([first, second], [1, 1], False):
            pass
        assert second.read_bytes() == b"of last week"

    def test_what_appears_meanwhile_stays(self, tmp_path: Path) -> None:
        from dsconvert.checkpoints.output_files import part_files
        from dsconvert.errors import OutputError

        path = tmp_path / "m.gguf"
        with pytest.raises(OutputError, match="appeared"), part_files([path], [3], False) as (part,):
            part.write(b"new", 0)
            path.write_bytes(b"another's")
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.gguf", b"another's")]

    @pytest.mark.parametrize("code", ["ENOSPC", "EFBIG", "EIO"])
    def test_a_disk_that_refuses_the_first_byte(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
    ) -> None:
        import errno

        from dsconvert.checkpoints import output_files
        from dsconvert.errors import OutputError

        def refuse(fd: int, data: bytes, offset: int) -> int:
            number = getattr(errno, code)
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(output_files.os, "pwrite", refuse)
        with (
            pytest.raises(OutputError) as raised,
            output_files.part_files([tmp_path / "m.gguf"], [3], False),
        ):
            pass
        assert ("--split-max-size" in str(raised.value)) == (code == "EFBIG")
        assert ("the disk is full" in str(raised.value)) == (code == "ENOSPC")
        assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from dsconvert.commands.display import Display
from dsconvert.commands.run import run
from dsconvert.console import render
from dsconvert.events import Step
from dsconvert.checkpoints.output_files import part_files
from dsconvert.quantization.run_state import open_state
number, inside = getattr(signal, sys.argv[1]), sys.argv[2] == "inside"
folder, begun = Path(sys.argv[3]), sys.argv[4] == "begun"
if number == signal.SIGINT:  # which the jobs that a shell runs in the background ignore
    signal.signal(number, signal.default_int_handler)

class Interrupts:
    def write(self, text):
        os.kill(os.getpid(), number)
    def flush(self): pass
    def isatty(self): return False

def events():
    identity = dict.fromkeys(("model", "options", "calibration", "version"), "x")
    with open_state(folder / "out", identity, resume=False) as state:
        if begun:
            state.keep("measured-00000", {"a": 1})
        with part_files([folder / "x.gguf"], [3], force=False) as parts:
            if inside:
                os.kill(os.getpid(), number)
            stderr, sys.stderr = sys.stderr, Interrupts()
            try:
                yield Step("half")  # the console is at work, and the conversion waits
            finally:
                sys.stderr = stderr

run(lambda: render(events()), Display(), debug=False)
"""


class TestInterruptions:
    """SIGTERM, SIGHUP and Ctrl-C, while the conversion works and while the console does."""

    @pytest.mark.parametrize("where", ["inside", "outside"])
    @pytest.mark.parametrize("begun", ["begun", "nothing"])
    @pytest.mark.parametrize("number", ["SIGTERM", "SIGHUP", "SIGINT"])
    def test_what_is_left_is_said(self, tmp_path: Path, number: str, where: str, begun: str) -> None:
        command = [sys.executable, "-c", INTERRUPTED, number, where, str(tmp_path), begun]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 2, found.stderr
        assert "interrupted" in found.stderr
        left = [path.name for path in tmp_path.iterdir()]
        assert left == (["out.state"] if begun == "begun" else [])
        assert ("No unfinished file was left" in found.stderr) == (begun == "nothing")
        assert (str(tmp_path / "out.state") in found.stderr) == (begun == "begun")
        assert ("--resume" in found.stderr) == (begun == "begun")

    def test_nohup_is_heeded(self, tmp_path: Path) -> None:
        script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + INTERRUPTED
        command = [sys.executable, "-c", script, "SIGHUP", "inside", str(tmp_path), "nothing"]
        found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert found.returncode == 0, found.stderr
        assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
