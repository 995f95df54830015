"""`dsconvert inspect` of folders: every byte is some tensor's, and what made the folder is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from click.testing import CliRunner, Result

from dsconvert.checkpoints.weight_files import open_weights
from dsconvert.cli import cli
from dsconvert.proof.folder_summary import MANY, flat

TEXT = "--calib builtin --calib-samples 2 --calib-len 64"
MADE = {
    "GPTQ": f"gptq --bits 4 -g 32 {TEXT}",
    "EXL2": f"exl2 --bpw 4 --head-bits 8 {TEXT}",
    "compressed-tensors": "compressed --scheme nvfp4a16",
    "MLX": "mlx --bits 6 -g 32 --head-bits 8",
}
# The bits of the first block's q_proj, with scales, and what else a matrix is stored with: 64 by 64.
BITS = {"GPTQ": 4 + 20 / 32 + 32 / 64, "compressed-tensors": 4 + 8 / 16 + 32 / 4096, "MLX": 6 + 32 / 32}


def command(*words: str | Path) -> Result:
    result = CliRunner().invoke(cli, list(map(str, words)))
    assert result.exit_code == 0, result.output
    return result


def inspected(folder: str | Path) -> dict[str, Any]:
    found = json.loads(command("inspect", folder, "--json").stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    small = tiny.Tiny(layers=1, d=64, ff=160, heads=4, kv_heads=4)
    return tiny.tiny_checkpoint(tmp_path_factory.mktemp("inspect") / "model", small)


@pytest.mark.parametrize("kind", MADE)
def test_a_folder_is_shown_to_the_byte(kind: str, model: Path, tmp_path: Path) -> None:
    if TEXT in MADE[kind]:
        pytest.importorskip("torch")
    name, *options = MADE[kind].split()
    out = tmp_path / "out"
    command(name, model, *options, "-o", out, "--effort", "off")
    found = inspected(out)
    stored = sum(tensor.nbytes for tensor in open_weights(out).tensors.values())
    assert found["kind"] == kind
    assert sum(tensor["bytes"] for tensor in found["tensors"]) == stored
    assert sum(one["bytes"] for one in found["types"].values()) == stored
    assert found["bits_per_weight"] == pytest.approx(8 * stored / found["weights"], abs=1e-4)
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert by_name.keys() == {tensor["name"] for tensor in inspected(model)["tensors"]}
    query = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert query["shape"] == [64, 64]
    if kind in BITS:
        assert query["bits_per_weight"] == pytest.approx(BITS[kind], abs=1e-4)
    else:
        assert 2 < query["bits_per_weight"] < 9
    assert "dsconvert:" in str(found["keys"]["quantization_config.meta.quantizer"])
    if TEXT in MADE[kind]:
        assert found["keys"]["quantization_config.meta.calibration.text"] == "builtin"
    shown = command("inspect", out, "--tensors").stdout
    assert "model.layers.0.self_attn.q_proj.weight" in shown
    assert f"  {kind}, {found['quant']}" in shown


def test_a_checkpoint_and_a_gguf_file_in_one_command(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    command("gguf", "sample:", "-q", "q8_0", "-o", out, "--effort", "off")
    shown = command("inspect", "sample:", out).stdout
    assert "checkpoint, bf16, 5.25 MB, 2,622,720 weights, 16.0 bits per weight" in shown
    assert "q8_0" in shown
    assert "8.50" in shown


def test_what_is_big_is_counted() -> None:
    value = {"a": {"b": list(range(MANY)), "c": {}}, "d": dict.fromkeys(map(str, range(MANY + 1)))}
    assert dict(flat(value)) == {"a.b": list(range(MANY)), "d": {"count": MANY + 1}}
