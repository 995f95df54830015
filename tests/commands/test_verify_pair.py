"""`dsconvert verify TEXT.gguf --mmproj MMPROJ.gguf`: the pair of the embedded sample, and what is planted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_vl
from click.testing import CliRunner, Result

from converters.gguf.parse import GGUFFile, open_gguf
from dsconvert.checkpoints.locate import locate
from dsconvert.cli import cli
from dsconvert.models.config import load_json

pytest.importorskip("torch")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def verify(text: Path, mmproj: Path, *options: object, against: object = "sample-vl:") -> Result:
    ask = ("--windows", 1, "--length", 128)
    return command("verify", text, "--against", against, "--mmproj", mmproj, *ask, *options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("pair") / "vl.gguf"
    made = command("gguf", "sample-vl:", "-q", "q8_0", "-o", out, "--effort", "off", "--threads", 2)
    assert made.exit_code == 0, made.output
    return out, out.with_name("mmproj-vl.gguf")


def test_the_pair_passes_in_all_reports(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out, page = tmp_path / "proof.json", tmp_path / "proof.html"
    result = verify(*pair, "--json", out, "--report", page)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    checks = {check["name"]: check for check in found["checks"]}
    assert found["passed"] is True
    assert all(check["passed"] for check in checks.values())
    assert {"token ids", "weights", "mean KLD", "mmproj tensors", "mmproj weights", "mmproj pair"} <= set(
        checks
    )
    assert 0 < checks["mmproj images"]["value"] < 1e-3
    assert 0 < checks["mmproj question"]["value"] < 0.005
    assert found["provenance"]["projector"] == f"{pair[1]}, f16"
    html = page.read_text()
    for name in checks:
        assert f"<td>ok</td><td>{name}</td>" in html
        assert f"ok    {name}" in result.stdout


def test_the_verdict_is_that_of_a_conversion(tmp_path: Path) -> None:
    out = tmp_path / "vl.gguf"
    made = command("gguf", "sample-vl:", "-q", "q4_0", "-o", out, "--effort", "full", "--json")
    events = [json.loads(line) for line in made.stdout.splitlines()]
    found = json.loads(verify(out, out.with_name("mmproj-vl.gguf"), "--json", "-").stdout)

    def of_projector(checks: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
        named = {c["name"]: (c["passed"], c["detail"]) for c in checks if c["name"].startswith("mmproj ")}
        return {name: named[name] for name in named.keys() - {"mmproj structure"}}  # known by its plan alone

    converted = of_projector([event for event in events if event["event"] == "check"])
    assert of_projector(found["checks"]) == converted
    assert {"mmproj weights", "mmproj pair", "mmproj images", "mmproj question"} <= set(converted)


def test_a_limit_holds_for_the_question_too(pair: tuple[Path, Path]) -> None:
    result = verify(*pair, "--max-kld", 1e-9)
    assert result.exit_code == 3
    assert "FAIL  mmproj question" in result.stderr


def span(file: GGUFFile, name: str) -> slice:
    tensor = file.tensors[name]
    return slice(tensor.offset, tensor.offset + tensor.nbytes)


def other_seed(data: bytearray, file: GGUFFile) -> None:
    """The matrices of a projector that was trained from another seed: as large, and not the same."""
    rng = np.random.default_rng(1)
    for name, tensor in file.tensors.items():
        if tensor.qtype.name == "f16":
            values = tensor.float32()
            other = rng.normal(0, values.std(), values.shape).astype(np.float16)
            data[span(file, name)] = other.tobytes()


def zeroed(data: bytearray, file: GGUFFile) -> None:
    where = span(file, "v.blk.1.ffn_up.weight")
    data[where] = bytes(where.stop - where.start)


def swapped_aligner(data: bytearray, file: GGUFFile) -> None:
    """The aligner's two biases in each other's place; they are of one shape."""
    a, b = span(file, "mm.0.bias"), span(file, "mm.1.bias")
    data[a], data[b] = data[b], data[a]


def other_heads(data: bytearray, file: GGUFFile) -> None:
    """No weight is wrong, and a runtime would compute something else."""
    key = b"clip.vision.attention.head_count"
    at = data.index(key) + len(key) + 4
    data[at : at + 4] = (2).to_bytes(4, "little")


def other_pair(data: bytearray, file: GGUFFile) -> None:
    at = data.index(file.keys["dsconvert.pairing_id"].encode())
    data[at : at + 4] = b"0000"


def no_gelu(data: bytearray, file: GGUFFile) -> None:
    key = b"clip.use_gelu"
    data[data.index(key) + len(key) + 4] = 0


def no_type(data: bytearray, file: GGUFFile) -> None:
    at = data.index(b"janus_pro")
    data[at : at + 9] = b"janus_prp"


Plant = Callable[[bytearray, GGUFFile], None]
DEFECTS: dict[str, tuple[Plant, set[str], str]] = {
    "another seed": (other_seed, {"weights", "images", "question"}, "signal to noise -"),
    "a tensor zeroed": (zeroed, {"weights", "images"}, "v.blk.1.ffn_up.weight: signal to noise 0.0 dB"),
    "aligner swapped": (swapped_aligner, {"weights", "images"}, "mm.0.bias: signal to noise"),
    "another number of heads": (other_heads, {"images"}, "embeddings of a picture: relative error"),
    "of another text file": (other_pair, {"pair"}, "their pairing ids differ"),
    "activation not said": (no_gelu, {"activation"}, "clip.use_gelu should be true"),
    "of another type": (no_type, {"projector"}, "type 'janus_prp', the tensors are those of 'janus_pro'"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_planted_defect_is_caught_and_named(pair: tuple[Path, Path], tmp_path: Path, defect: str) -> None:
    plant, names, said = DEFECTS[defect]
    data = bytearray(pair[1].read_bytes())
    plant(data, open_gguf(pair[1]))
    assert data != pair[1].read_bytes()
    bad = tmp_path / "mmproj-bad.gguf"
    bad.write_bytes(data)
    result = verify(pair[0], bad, "--json", "-")
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    failed = {check["name"] for check in found["checks"] if not check["passed"]}
    assert failed >= {f"mmproj {name}" for name in names}
    assert all(name.startswith("mmproj ") for name in failed)
    assert any(said in reason for reason in found["reasons"]), found["reasons"]
    assert said in result.stderr


def test_a_defect_of_the_text_file_shows_in_the_question(pair: tuple[Path, Path], tmp_path: Path) -> None:
    data, file = bytearray(pair[0].read_bytes()), open_gguf(pair[0])
    where = span(file, "blk.1.ffn_up.weight")
    data[where] = bytes(where.stop - where.start)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    result = verify(bad, pair[1], "--json", "-")
    assert result.exit_code == 3
    failed = {check["name"] for check in json.loads(result.stdout)["checks"] if not check["passed"]}
    assert {"weights", "mmproj question"} <= failed
    assert "mmproj images" not in failed


def test_what_is_no_pair_is_an_error(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, mmproj = pair
    copy = shutil.copy(text, tmp_path / "copy.gguf")
    gptq, exl2 = tmp_path / "gptq", tmp_path / "exl2"
    small = ("--calib", "builtin", "--calib-samples", 2, "--calib-len", 64, "--effort", "off", "--quiet")
    for folder, bits in ((gptq, ("--bits", 4)), (exl2, ("--bpw", 4))):
        made = command(folder.name, "sample:", *bits, "--out", folder, *small)
        assert made.exit_code == 0, made.output
    tiny_vl.tiny_towers(monkeypatch)
    other = tiny_vl.vl_checkpoint(tmp_path / "other", tiny_vl.VL())
    assert command("gguf", other, "-q", "f16", "-o", tmp_path / "o.gguf", "--effort", "off").exit_code == 0
    for output, against, projector, said in (
        (text, "sample:", mmproj, "the checkpoint has no vision tower"),
        (text, "sample-vl:", copy, "--mmproj should be a projector"),
        (text, "sample-vl:", text, "are the same file"),
        (mmproj, "sample-vl:", mmproj, "are the same file"),
        (mmproj, "sample-vl:", text, "OUTPUT should be the text file"),
        (gptq, "sample-vl:", mmproj, "this is a folder (GPTQ)"),
        (exl2, "sample-vl:", mmproj, "this is a folder (EXL2)"),
        (text, "sample-vl:", tmp_path / "none.gguf", "cannot be opened as a GGUF file"),
        (text, "sample-vl:", gptq, "cannot be opened as a GGUF file"),
        (text, "sample-vl:", tmp_path / "mmproj-o.gguf", "not of the same model"),
    ):
        result = verify(output, projector, against=against)
        assert result.exit_code == 2, (output, projector, result.output)
        assert said in result.stderr, result.stderr
        assert "Traceback" not in result.output


def test_a_projector_of_pictures_of_another_size_is_named(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same grid of patches, so that every tensor has its shape."""
    assert load_json(locate("sample-vl:") / "config.json")["vision_config"]["image_size"] == 384
    data = bytearray(pair[1].read_bytes())
    key = b"clip.vision.image_size"
    at = data.index(key) + len(key) + 4
    assert int.from_bytes(data[at : at + 4], "little") == 384
    data[at : at + 4] = (390).to_bytes(4, "little")
    bad = tmp_path / "mmproj-bad.gguf"
    bad.write_bytes(data)
    result = verify(pair[0], bad)
    assert result.exit_code == 2
    assert "the side of SigLIP's picture is 390, the checkpoint has 384" in result.stderr
