"""`dsconvert gguf --calib`: an importance matrix made on the way is the one that goes through a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from click.testing import CliRunner, Result

from converters.gguf import importance
from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.cli import cli
from dsconvert.events import Planned

SMALL = ["--calib", "builtin", "--calib-samples", "4", "--calib-len", "64"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("tiny"), d=256, ff=512, heads=4, kv_heads=2)


def dsconvert(*words: object, code: int = 0) -> Result:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    assert done.exit_code == code, done.output
    return done


def same_but_for_the_name(ours: GGUFFile, through: GGUFFile) -> None:
    """Equal bytes in every tensor, equal keys; only a matrix that was a file has a name."""
    assert ours.tensors.keys() == through.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert tensor.qtype == through.tensors[name].qtype
        assert (tensor.blocks() == through.tensors[name].blocks()).all(), name
    keys = dict(through.typed)
    assert keys.pop("quantize.imatrix.file") == ("string", "m.gguf")
    assert dict(ours.typed) == keys


def differing(first: GGUFFile, second: GGUFFile) -> set[str]:
    pairs = ((name, tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    return {name for name, a, b in pairs if a.blocks().tobytes() != b.blocks().tobytes()}


def test_on_the_way_gives_the_bytes_of_the_way_through_a_file(tmp_path: Path, model: Path) -> None:
    """Several types from one measurement, one of which cannot do without."""
    quants, plain = "q4_0,q4_k_m,q2_k_s", tmp_path / "plain.gguf"
    dsconvert("imatrix", model, *SMALL, "-o", tmp_path / "m.gguf")
    common = ["gguf", model, "--effort", "off", "-q", quants]
    dsconvert(*common, "--imatrix", tmp_path / "m.gguf", "-o", tmp_path / "through.gguf")
    dsconvert(*common, *SMALL, "-o", tmp_path / "ours.gguf")
    dsconvert("gguf", model, "--effort", "off", "-q", "q4_0", "-o", plain)
    for quant in quants.split(","):
        ours, through = (open_gguf(tmp_path / f"{name}-{quant}.gguf") for name in ("ours", "through"))
        same_but_for_the_name(ours, through)
    changed = differing(open_gguf(tmp_path / "ours-q4_0.gguf"), open_gguf(plain))
    assert len(changed) == 2 * 7, "a matrix that changes nothing would be the same on both ways"
    keys = open_gguf(tmp_path / "ours-q4_0.gguf").keys
    assert keys["quantize.imatrix.entries_count"] == 2 * 7
    assert keys["quantize.imatrix.chunks_count"] == 4
    assert keys["quantize.imatrix.dataset"].startswith("builtin sha256:")
    report = json.loads(keys[importance.REPORT])
    assert (report["tokens"], report["text"]) == (4 * 64, "builtin")
    assert keys["quantize.imatrix.dataset"] == f"builtin sha256:{report['fingerprint']}"


def test_of_a_model_with_a_tower_the_language_model_is_measured(tmp_path: Path) -> None:
    dsconvert("imatrix", "sample-vl:", *SMALL, "-o", tmp_path / "m.gguf")
    common = ["gguf", "sample-vl:", "--effort", "off", "-q", "q4_0"]
    dsconvert(*common, "--imatrix", tmp_path / "m.gguf", "-o", tmp_path / "through.gguf")
    dsconvert(*common, *SMALL, "-o", tmp_path / "ours.gguf")
    ours, through = (open_gguf(tmp_path / f"{name}.gguf") for name in ("ours", "through"))
    same_but_for_the_name(ours, through)
    first, second = (tmp_path / f"mmproj-{name}.gguf" for name in ("ours", "through"))
    assert first.read_bytes() == second.read_bytes()


def test_conversations_are_written_with_the_models_template(tmp_path: Path) -> None:
    said = "a text with words enough that a few windows of tokens can be cut from it " * 20
    turns = [{"role": "user", "content": said}, {"role": "assistant", "content": said[::-1]}]
    chat = tmp_path / "chat.jsonl"
    model = tiny.tiny_checkpoint(tmp_path / "model", d=256, ff=512, heads=4, kv_heads=2)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template, "utf-8")
    chat.write_text("\n".join(json.dumps({"messages": turns}) for _ in range(3)), "utf-8")
    asked = ["--calib-chat", chat, "--calib-samples", "3", "--calib-len", "64"]
    common = ["gguf", model, "--effort", "off", "-q", "q4_0"]
    dsconvert("imatrix", model, *asked, "-o", tmp_path / "m.gguf")
    dsconvert(*common, "--imatrix", tmp_path / "m.gguf", "-o", tmp_path / "through.gguf")
    dsconvert(*common, *asked, "-o", tmp_path / "ours.gguf")
    ours, through = (open_gguf(tmp_path / f"{name}.gguf") for name in ("ours", "through"))
    same_but_for_the_name(ours, through)
    assert ours.keys["quantize.imatrix.dataset"].startswith("chat.jsonl sha256:")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--calib", "builtin", "--imatrix", "m.gguf"], "--imatrix and --calib contradict each other"),
        (["--calib-chat", "none.jsonl"], "none.jsonl: is not a file"),
        (["--calib-samples", "3"], "--calib-samples has no effect without a calibration text"),
        (["--seed", "3"], "--seed has no effect without a calibration text"),
        (["--calib", "c5"], "neither a known text"),
        (["--calib", "builtin", "--calib-samples", "9000000"], "ask for less"),
        (["-q", "q2_k_s"], "--calib c4"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, model: Path, asked: list[str], said: str) -> None:
    done = dsconvert("gguf", model, "-o", tmp_path / "out.gguf", *asked, code=2)
    assert said in done.output
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_anything_is_measured(tmp_path: Path, model: Path) -> None:
    (tmp_path / "out.gguf").write_text("a file", "utf-8")
    done = dsconvert("gguf", model, "-o", tmp_path / "out.gguf", *SMALL, code=2)
    assert "exists already" in done.output
    assert "drawing" not in done.output


def test_nothing_is_measured_for_types_that_take_none(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.gguf"
    done = dsconvert("gguf", model, "--effort", "off", "-q", "q8_0", "-o", out, *SMALL)
    assert "--calib changes nothing" in done.output
    assert "block 1" not in done.output
    assert "quantize.imatrix.dataset" not in open_gguf(out).keys


def test_the_plan_is_exact_and_comes_before_the_measurement(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.gguf"
    done = dsconvert("gguf", model, "--effort", "off", "-q", "q4_0", "-o", out, "--json", *SMALL)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    (planned,) = (event for event in events if event["event"] == "planned")
    assert planned["nbytes"] == [out.stat().st_size]
    measuring = next(i for i, e in enumerate(events) if "measuring on" in e.get("text", ""))
    assert kinds.index("planned") < measuring
    dry = dsconvert("gguf", model, "-q", "q4_0", "--dry-run", "--json", *SMALL)
    events = [json.loads(line) for line in dry.stdout.splitlines()]
    (dry_planned,) = (event for event in events if event["event"] == Planned.__name__.lower())
    assert 0 < planned["nbytes"][0] - dry_planned["nbytes"][0] < 3000
    assert any("on top of the sizes" in event.get("text", "") for event in events)


def test_without_it_no_torch_is_loaded(tmp_path: Path, model: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from converters.gguf.convert import convert;"
        "from converters.gguf.output import Options;"
        "list(convert(Options(sys.argv[1], ('q4_0',), Path(sys.argv[2]), effort='off')));"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script, model, tmp_path / "out.gguf"], check=True)
