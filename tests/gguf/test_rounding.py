"""Plain rounding to every GGUF type: ggml's own quantizer is the oracle."""

from __future__ import annotations

from pathlib import Path

import ggml_oracle
import numpy as np
import pytest
from click.testing import CliRunner

from converters.gguf.as_model import open_model
from converters.gguf.parse import open_gguf
from converters.gguf.qtypes import BY_ID, NEEDED, QTYPES
from converters.gguf.rounding import dequantize, nearest
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.cli import cli

ROWS = np.random.default_rng(5).standard_normal((7, 512)).astype(np.float32) * np.float32(0.04)


@pytest.mark.skipif(not ggml_oracle.available(), reason=ggml_oracle.MISSING)
@pytest.mark.parametrize("name", [name for name in QTYPES if name not in ("mxfp4", "bf16", "f32", "f16")])
def test_is_what_ggml_makes_of_the_rows(name: str) -> None:
    qtype = QTYPES[name]
    flat = np.ones(512, np.float32) if qtype.importance == NEEDED else None
    expected = dequantize(ggml_oracle.quantize(name, ROWS, flat), qtype)
    kept = ROWS.copy()
    found = nearest(ROWS, qtype)
    assert found is not None
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(ROWS, kept)


def test_each_row_is_rounded_on_its_own_and_16_bit_types_to_their_next_value() -> None:
    for qtype in QTYPES.values():
        whole, part = nearest(ROWS, qtype), nearest(ROWS[3:5], qtype)
        assert whole is not None
        assert part is not None
        np.testing.assert_array_equal(whole[3:5], part, err_msg=qtype.name)
    np.testing.assert_array_equal(nearest(ROWS, QTYPES["f32"]), ROWS)
    np.testing.assert_array_equal(nearest(ROWS, QTYPES["f16"]), ROWS.astype(np.float16).astype(np.float32))


def test_nothing_rounds_to_a_type_that_is_only_read_or_whose_blocks_do_not_fit() -> None:
    assert nearest(ROWS, BY_ID[19]) is None  # iq1_s
    assert nearest(ROWS[:, :64], QTYPES["q4_k"]) is None


@pytest.mark.parametrize("quant", ["q4_0", "q4_k_m"])
def test_a_plain_file_holds_just_that(tmp_path: Path, quant: str) -> None:
    """In the checkpoint's own layout too, which for q and k is another than the file's."""
    out = tmp_path / "sample.gguf"
    made = CliRunner().invoke(cli, ["gguf", "sample:", "-q", quant, "-o", str(out), "--verify", "off"])
    assert made.exit_code == 0, made.output
    source, model = open_checkpoint("sample:"), open_model(open_gguf(out))
    for name, shape in model.shapes().items():
        base = source.float32(name)
        found = model.nearest(name, 0, base.reshape(-1, shape[-1]))
        assert found is not None
        np.testing.assert_array_equal(found.reshape(shape), model.float32(name), err_msg=name)
