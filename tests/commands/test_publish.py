"""--card and --push-to: a model card that says what was measured, and an upload that harms nobody's files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from click.testing import CliRunner, Result
from hub_server import COMMIT, Hub, serving, sha256
from huggingface_hub import constants

from dsconvert.cli import cli
from dsconvert.proof.thresholds import LIMITS
from dsconvert.report import card

# The client's own, in its version of today.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SMALL = tiny.Tiny(layers=1, d=64, ff=160, heads=4, kv_heads=2)
STRANGE = "# My notes\n"
PUSH = ("--push-to", "owner/made")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub({"owner/other": {"README.md": STRANGE.encode(), "x.bin": b"x"}})) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name, value in (("HF_TOKEN", "secret"), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        yield served


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model in the layout of the hub's cache, with a card of its own."""
    folder = tmp_path / "models--maker--tiny" / "snapshots" / COMMIT
    tiny.tiny_checkpoint(folder, SMALL)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# tiny\n")
    return folder


def run(*arguments: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


# --- the card --------------------------------------------------------------------------------------------


def test_a_card_says_what_was_measured_and_how_it_was_made(model: Path, tmp_path: Path) -> None:
    result = run("gguf", model, "-q", "q8_0,q4_0", "-o", tmp_path / "out.gguf", "--card", "--json")
    text = (tmp_path / "README.md").read_text()
    assert front(text) == {
        "base_model": ["maker/tiny"],
        "base_model_relation": "quantized",
        "license": "mit",
        "library_name": "gguf",
        "tags": ["dsconvert", "gguf", "q8_0", "q4_0"],
    }
    proven = [e for e in map(json.loads, result.stdout.splitlines()) if e["event"] == "proven"]
    for event in proven:
        path = Path(event["path"])
        assert f"| {path.name} | {event['nbytes'] / 1e6:,.1f} | {event['bits']:.2f} |" in text
        assert f"| {event['figures']['kld']['value']:.5f} |" in text
        assert f"| {path.name} | {path.stat().st_size:,} | `{sha256(path.read_bytes())}` |" in text
        assert f"    dsconvert verify {path.name} --against maker/tiny@{COMMIT}\n" in text
    assert f"    dsconvert gguf {model} -q q8_0,q4_0 -o {tmp_path}/out.gguf --card --json\n" in text
    assert "| ok | structure | " in text
    assert [entry.name for entry in card.entries_of(text) or ()] == ["out-q8_0.gguf", "out-q4_0.gguf"]


def test_the_next_output_adds_its_lines_to_a_card_of_ours(model: Path, tmp_path: Path) -> None:
    for quant in ("q8_0", "q4_0", "q8_0"):
        run("gguf", model, "-q", quant, "-o", tmp_path / f"{quant}.gguf", "--card", "--force")
    text = (tmp_path / "README.md").read_text()
    assert [entry.name for entry in card.entries_of(text) or ()] == ["q8_0.gguf", "q4_0.gguf"]
    assert text.count("## Measured") == 1


def test_somebody_elses_readme_is_left_and_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(STRANGE)
    result = run("gguf", model, "-o", tmp_path / "out.gguf", "--card", "--force", code=2)
    assert "is not a card that dsconvert made" in result.output
    assert (tmp_path / "README.md").read_text() == STRANGE
    assert not list(tmp_path.glob("*.gguf*"))


def test_a_failed_check_is_on_the_card_and_nothing_is_uploaded(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LIMITS, "q8_0", replace(LIMITS["q8_0"], max_kld=0.0))
    result = run("gguf", model, "-q", "q8_0", "-o", tmp_path / "out.gguf", "--card", *PUSH, code=3)
    assert "nothing is uploaded to owner/made: a check failed" in result.output
    assert "**FAILED**" in (tmp_path / "README.md").read_text()
    assert "owner/made" not in hub.files


def test_what_a_file_says_cannot_break_a_card() -> None:
    evil = "a|b\n\n# head <script> --> [x](http://y)"
    entry = card.Entry(evil, "GGUF", "q4_0", 1, 4.5, True, evil, "", "", f"dsconvert gguf '{evil}'",
                       checks=(("name", True, evil),), provenance={"text": evil})  # fmt: skip
    text = card.render([entry])
    assert card.entries_of(text) == (entry,)
    body = text.partition(card.MARK)[0]
    assert "\n# head" not in body
    code = "    "  # lines that a browser is shown as they are
    shown = [line.replace("\\<script\\>", "") for line in body.splitlines() if not line.startswith(code)]
    assert not any("<script>" in line for line in shown)
    assert text.count("-->") <= 2 + body.count("-->")


@pytest.mark.parametrize(
    "text", ["", STRANGE, "<!-- dsconvert {} -->", '<!-- dsconvert {"outputs": [1]} -->']
)
def test_only_a_card_of_ours_is_one(text: str) -> None:
    assert card.entries_of(text) is None


# --- the upload ------------------------------------------------------------------------------------------


def test_outputs_and_card_are_uploaded_in_one_commit(model: Path, hub: Hub, tmp_path: Path) -> None:
    result = run("gguf", model, "-q", "q8_0", "-o", tmp_path / "out.gguf", *PUSH, "--private")
    assert f"wrote {hub.url}/owner/made" in result.output
    held = hub.files["owner/made"]
    assert held["out.gguf"] == (tmp_path / "out.gguf").read_bytes()
    assert "| out.gguf |" in held["README.md"].decode()
    ((message, names),) = hub.uploads.commits
    assert message.startswith("q8_0 by dsconvert ")
    assert sorted(names) == ["README.md", "out.gguf"]
    assert hub.uploads.private["owner/made"]
    assert not (tmp_path / "README.md").exists(), "the card is written here with --card alone"
    run("gguf", model, "-q", "q4_0", "-o", tmp_path / "two.gguf", *PUSH)
    named = [entry.name for entry in card.entries_of(held["README.md"].decode()) or ()]
    assert named == ["out.gguf", "two.gguf"]


@pytest.mark.parametrize(
    ("command", "library"),
    [
        ("gptq --bits 8 -g 32 --calib builtin --calib-samples 8 --calib-len 64", "transformers"),
        ("compressed --scheme fp8-block", "transformers"),
        ("mlx --bits 8 -g 32", "mlx"),
    ],
)
def test_a_folder_is_uploaded_with_all_its_files(
    model: Path, hub: Hub, tmp_path: Path, command: str, library: str
) -> None:
    name, *options = command.split()
    folder = tmp_path / "folder"
    run(name, model, *options, "-o", folder, "--push-to", "lab/made", "--card")
    here = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.files["lab/made"] == here
    card_here = here["README.md"].decode()
    assert front(card_here)["library_name"] == library
    assert "| model.safetensors | " in card_here


def test_somebody_elses_readme_on_the_hub_stays(model: Path, hub: Hub, tmp_path: Path) -> None:
    result = run("gguf", model, "-o", tmp_path / "out.gguf", "--push-to", "owner/other")
    assert "README.md of owner/other is not a card that dsconvert made, and stays as it is" in result.output
    assert hub.files["owner/other"]["README.md"].decode() == STRANGE
    assert "out.gguf" in hub.files["owner/other"]


def refuse_login(hub: Hub) -> None:
    hub.status["whoami-v2"] = 401


def read_only(hub: Hub) -> None:
    hub.uploads.role = "read"


def stranger(hub: Hub) -> None:
    hub.uploads.user = "somebody"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (refuse_login, "may not be written"),
        (read_only, "may not be written with this token. It may read only"),
        (stranger, "'somebody' is not 'owner', nor a member of it"),
    ],
)
def test_who_may_not_write_is_told_before_any_work(
    model: Path, hub: Hub, tmp_path: Path, change: Any, said: str
) -> None:
    change(hub)
    result = run("gguf", model, "-o", tmp_path / "out.gguf", *PUSH, code=2)
    assert said in result.output
    assert "hf auth login" in result.output
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("path", ["api/repos/create", "preupload/main", "commit/main"])
def test_an_upload_that_fails_names_what_does_it_by_hand(
    model: Path, hub: Hub, tmp_path: Path, path: str
) -> None:
    hub.uploads.status[path] = 403
    result = run("gguf", model, "-o", tmp_path / "out.gguf", *PUSH, code=2)
    assert "error: owner/made: may not be written" in result.output
    assert f"by hand: hf upload owner/made {tmp_path}/out.gguf" in result.output
    assert (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--card", "--effort", "off"), "--card has no effect with --effort off"),
        ((*PUSH, "--dry-run"), "--push-to has no effect with --dry-run"),
        (("--private",), "--private has no effect without --push-to"),
        (("--push-to", "made"), "is not of the form ORG/NAME"),
        (("--push-to", "owner/made@v1"), "is not of the form ORG/NAME"),
    ],
)
def test_options_that_say_nothing_are_refused(options: tuple[str, ...], said: str) -> None:
    assert said in run("gguf", "sample:", *options, code=2).output


def test_an_upload_needs_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in run("gguf", "sample:", *PUSH, code=2).output
