"""Small floats: rounding against loops, what is stored against the reader, whole folders, damaged ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import calibrated
import numpy as np
import pytest
import tiny
from click.testing import CliRunner

from converters.compressed import rounded
from converters.compressed.convert import convert
from converters.compressed.floats import E2M1, E4M3, from_nibbles, to_e2m1, to_e4m3, to_nibbles
from converters.compressed.fused import FUSED
from converters.compressed.reader import open_model
from converters.compressed.rounded import Weight, largest
from converters.compressed.schemes import SCHEMES
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.checkpoints.safetensors_reader import read_safetensors
from dsconvert.checkpoints.safetensors_writer import from_bytes, from_stored, write_safetensors
from dsconvert.cli import cli
from dsconvert.errors import CheckpointError, QuantizationError
from dsconvert.events import Check, Event, Planned
from dsconvert.models.config import load_json

FLOATS = ("fp8-block", "nvfp4a16", "mxfp4a16")
LINEAR = "model.layers.0.self_attn.q_proj"


def nearest(value: float, grid: Any) -> float:
    """The value of a grid that is nearest; of two the one with an even code."""
    apart = np.abs(grid - value)
    best = np.flatnonzero(apart == np.nanmin(apart))
    return float(grid[next((i for i in best if i % 2 == 0), best[0])])


@pytest.mark.parametrize(("to", "grid"), [(to_e4m3, E4M3), (to_e2m1, E2M1)], ids=["e4m3", "e2m1"])
def test_values_become_the_nearest_with_ties_to_even(to: Callable[..., Any], grid: Any) -> None:
    positive = np.sort(grid[(grid > 0) & np.isfinite(grid)])
    ties = (positive[1:] + positive[:-1]) / 2
    rng = np.random.default_rng(0)
    between = rng.uniform(0, positive[-1], 300).astype(np.float32)
    tiny_ones = rng.uniform(0, positive[1], 50).astype(np.float32)
    values = np.concatenate([[0], positive, ties, between, tiny_ones, [positive[-1] * 9]]).astype(np.float32)
    half = grid[: len(grid) // 2]
    expected = [nearest(float(v), half) for v in values]
    np.testing.assert_array_equal(grid[to(values)], expected)
    np.testing.assert_array_equal(grid[to(-values)], np.negative(expected))


def test_e4m3_is_torchs() -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(1).standard_normal(100_000).astype(np.float32) * np.geomspace(
        1e-4, 300, 100_000
    )
    values = np.clip(values, -448, 448).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(to_e4m3(values), expected)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, every)


def test_two_codes_share_a_byte_the_first_in_its_lower_half() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (3, 8)).astype(np.uint8)
    assert to_nibbles(np.array([[3, 12]], np.uint8)).tolist() == [[0xC3]]
    np.testing.assert_array_equal(from_nibbles(to_nibbles(codes)), codes)


@pytest.mark.parametrize(
    ("rule", "width"), [(rounded.nearest_nvfp4, 16), (rounded.nearest_mxfp4, 32), (rounded.nearest_fp8, 128)]
)
def test_rows_keep_their_groups_ranges(rule: Callable[..., Any], width: int) -> None:
    """A group's error is bounded by its own largest value, a group of zeros stays so."""
    rows = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    rows *= np.geomspace(1, 1e3, 256 // width).repeat(width).astype(np.float32)
    rows[3, :width] = 0
    found = rule(rows)
    groups, apart = (np.abs(x).reshape(20, -1, width).max(2) for x in (rows, rows - found))
    assert not found[3, :width].any()
    assert (apart <= groups * (0.26 if width != 128 else 0.04)).all()
    assert np.square(rows - found).sum() > 0


def run(model: Path | str, out: Path, **more: Any) -> list[Event]:
    return list(convert(calibrated.compressed_options(model, out=out, **{"effort": "off", **more})))


@pytest.mark.parametrize("scheme", FLOATS)
def test_the_sample_passes_its_verdict_and_is_planned_to_the_byte(tmp_path: Path, scheme: str) -> None:
    events = run("sample:", tmp_path / "out", scheme=scheme, effort="quick")
    assert [e.detail for e in events if isinstance(e, Check) and not e.passed] == []
    assert sum(isinstance(e, Check) for e in events) >= 8
    (planned,) = (e for e in events if isinstance(e, Planned))
    stored = read_safetensors(tmp_path / "out" / "model.safetensors").values()
    assert planned.nbytes == (sum(tensor.nbytes for tensor in stored),)
    settings = load_json(tmp_path / "out" / "config.json")["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert settings["format"] == SCHEMES[scheme].format
    assert (group["input_activations"] is None) == (scheme != "fp8-block")


@pytest.mark.parametrize("scheme", FLOATS)
def test_the_reader_gives_what_the_rule_rounds_to(tmp_path: Path, scheme: str) -> None:
    """With blocks that are not whole, rows from anywhere in them, and one global scale for fused linears."""
    model = tiny.tiny_checkpoint(tmp_path / "m", d=192, ff=224, heads=4, kv_heads=2, layers=1)
    run(model, tmp_path / "out", scheme=scheme)
    read, source = open_model(tmp_path / "out"), open_checkpoint(model)
    assert len(read.linears) == 7
    for name, one in read.linears.items():
        rows, found = source.float32(f"{name}.weight"), read.float32(f"{name}.weight")
        np.testing.assert_array_equal(read.rows(f"{name}.weight", 37, 150), found[37:150])
        if scheme == "mxfp4a16":
            np.testing.assert_array_equal(found, rounded.nearest_mxfp4(rows))
            continue
        if scheme == "nvfp4a16":
            stem, _, last = name.rpartition(".")
            fused = next((members for members in FUSED if last in members), (last,))
            most = max(float(np.abs(source.float32(f"{stem}.{m}.weight")).max()) for m in fused)
            stored = one.parts["weight_global_scale"].rows(0, 1)
            assert stored.tolist() == [np.float32(448 * 6 / most)]
        noise, plain = (np.square(x - rows).sum() for x in (found, read.nearest(f"{name}.weight", 0, rows)))
        assert 0 < noise < 1.25 * plain < 0.05 * np.square(rows).sum()


def test_widths_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny.tiny_checkpoint(tmp_path / "m", d=64, ff=176)
    with pytest.raises(QuantizationError, match="inputs are a multiple of 32") as caught:
        run(model, tmp_path / "out", scheme="mxfp4a16")
    assert "down_proj" in str(caught.value)
    run(model, tmp_path / "out", scheme="nvfp4a16")
    run(model, tmp_path / "fp8", scheme="fp8-block")


@pytest.mark.parametrize("option", [("--calib", "c4"), ("--group-size", "32"), ("--sym",), ("--resume",)])
def test_options_of_the_solver_have_no_effect_and_are_refused(option: tuple[str, ...]) -> None:
    done = CliRunner().invoke(cli, ["compressed", "sample:", "--scheme", "fp8-block", *option])
    assert done.exit_code == 2
    assert f"{option[0]} has no effect with fp8-block" in " ".join(done.stderr.split())


Change = Callable[[dict[str, Any]], None]


def bytes_of(part: str, value: int) -> Change:
    def change(parts: dict[str, Any]) -> None:
        piece = parts[part]
        parts[part] = from_bytes(piece.dtype, piece.shape, bytes([value]) * piece.nbytes)

    return change


DAMAGES: dict[str, tuple[str, Change, str]] = {
    "fp8 codes that are not numbers": ("fp8-block", bytes_of("weight", 0x7F), "not a number"),
    "fp8 scales that are not numbers": ("fp8-block", bytes_of("weight_scale", 0xFF), "not a finite number"),
    "fp8 without scales": (
        "fp8-block", lambda parts: parts.update(weight_scales=parts.pop("weight_scale")), "holds no quantized"
    ),
    "nvfp4 scales that are not numbers": ("nvfp4a16", bytes_of("weight_scale", 0xFF), "not a number"),
    "a global scale of nothing": ("nvfp4a16", bytes_of("weight_global_scale", 0), "weight_global_scale is 0"),
    "no global scale": (
        "nvfp4a16", lambda parts: parts.pop("weight_global_scale"), "there is no weight_global_scale"
    ),
    "a power that is not a number": ("mxfp4a16", bytes_of("weight_scale", 255), "a scale is 255"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, name: str) -> None:
    scheme, change, said = DAMAGES[name]
    model = tiny.tiny_checkpoint(tmp_path / "m", layers=1)
    run(model, tmp_path / "out", scheme=scheme)
    path = tmp_path / "out" / "model.safetensors"
    tensors = {n: from_stored(one) for n, one in read_safetensors(path).items()}
    if "without" in name:  # of every linear
        tensors = {n: piece for n, piece in tensors.items() if "_scale" not in n}
    own = {n.rpartition(".")[2]: tensors.pop(n) for n in list(tensors) if n.startswith(f"{LINEAR}.")}
    if "without" not in name:
        change(own)
    write_safetensors(tmp_path / "new", {**tensors, **{f"{LINEAR}.{part}": p for part, p in own.items()}})
    (tmp_path / "new").rename(path)
    with pytest.raises(CheckpointError) as caught:
        open_model(tmp_path / "out").float32(f"{LINEAR}.weight")
    assert said in str(caught.value), str(caught.value)


@pytest.mark.parametrize("whole", [False, True])
def test_other_makers_scales_of_rows_and_of_tensors(tmp_path: Path, whole: bool) -> None:
    """FP8 and FP8_DYNAMIC: one scale for the tensor, one for each output."""
    model = tiny.tiny_checkpoint(tmp_path / "m", layers=1)
    run(model, tmp_path / "out", scheme="fp8-block")
    path, config = tmp_path / "out" / "model.safetensors", load_json(tmp_path / "out" / "config.json")
    tensors = {n: from_stored(one) for n, one in read_safetensors(path).items()}
    rng, scales = np.random.default_rng(0), {}
    for name in open_model(tmp_path / "out").linears:
        outputs = tensors[f"{name}.weight"].shape[0]
        scales[name] = rng.uniform(0.5, 1, 1 if whole else (outputs, 1)).astype(np.float32)
        shape = scales[name].shape
        tensors[f"{name}.weight_scale"] = from_bytes("F32", shape, scales[name].tobytes())
    codes = {
        n: np.frombuffer(b"".join(map(bytes, tensors[f"{n}.weight"].chunks())), np.uint8) for n in scales
    }
    write_safetensors(tmp_path / "new", tensors)
    (tmp_path / "new").rename(path)
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    weights.update(strategy="tensor" if whole else "channel", block_structure=None)
    tiny.write_json(tmp_path / "out" / "config.json", config)
    read = open_model(tmp_path / "out")
    for name, scale in scales.items():
        one = read.linears[name]
        expected = E4M3[codes[name]].reshape(one.outputs, one.inputs) * scale
        np.testing.assert_array_equal(read.float32(f"{name}.weight"), expected)


def test_the_largest_of_a_weight_is_read_once_in_blocks() -> None:
    seen: list[tuple[int, int]] = []
    values = np.arange(300 * 4, dtype=np.float32).reshape(300, 4) - 600

    def rows(start: int, stop: int) -> Any:
        seen.append((start, stop))
        return values[start:stop]

    assert largest(Weight(300, 4, rows)) == 600
    assert seen == [(0, 128), (128, 256), (256, 300)]
