"""What is predicted of llama.cpp of latent attention and experts, and where its rule is another."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import tiny_experts
from agreement import file_of
from click.testing import CliRunner

from converters.gguf.as_model import open_model
from converters.gguf.parse import open_gguf
from converters.outputs import open_reference
from dsconvert.cli import cli
from dsconvert.decoder import torch_decoder as st
from dsconvert.proof.compare import result
from dsconvert.texts import windows

torch = pytest.importorskip("torch")
from dsconvert.proof import runtime  # noqa: E402
from dsconvert.proof.runtime_rule import judge_rule  # noqa: E402
from dsconvert.proof.scores import hidden_states, scored_states  # noqa: E402

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)
GROUPED = {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}
IDS = windows.whole(np.random.default_rng(7).integers(20, 1900, (1, 300)))


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_experts.checkpoint(tmp_path_factory.mktemp("grouped") / "model", "v2", **GROUPED)


def decoders(model: Path, file: Path) -> tuple[st.Decoder, st.Decoder]:
    reference, found = open_reference(str(model)), open_model(open_gguf(file))
    sides = ((reference.source, reference.config), (found, found.config))
    first, second = (st.open_decoder(*side, torch.device("cpu"), torch.float32) for side in sides)
    return first, second


def figures(model: Path, file: Path) -> runtime.EngineFigures:
    """llama.cpp's run of the file, and what is predicted of it."""
    from dsconvert.runtimes.llamacpp import Engine

    types = {name: tensor.qtype.name for name, tensor in open_gguf(file).tensors.items()}
    with Engine(file, n_ctx=IDS.length, threads=1) as engine:
        return result(runtime.engine_figures(engine, decoders(model, file), IDS, types=types))


@pytest.mark.parametrize("quant", ["q8_0", "q4_k_m"])
def test_latent_attention_is_rounded_as_the_runtime_does(quant: str, tmp_path: Path) -> None:
    """Rounded as transformers computes it, it is as far from the runtime as if nothing were rounded."""
    model = tiny_experts.checkpoint(tmp_path / "model", "v3", num_hidden_layers=2, first_k_dense_replace=2)
    found = figures(model, file_of(model, tmp_path / "x.gguf", quant))
    assert 0 < found.parity.kld.value < found.rounding.kld.value / 3


def test_groups_are_taken_as_the_runtime_takes_them(grouped: Path, tmp_path: Path) -> None:
    file = file_of(grouped, tmp_path / "x.gguf")
    found = figures(grouped, file)
    assert found.parity.kld.value < 1e-9
    assert found.figures.kld.value > 1e-4
    _, decoder = decoders(grouped, file)
    norm, _ = st.head_weights(decoder)
    states = scored_states(decoder, norm, result(hidden_states(decoder, IDS)), IDS)
    (check,) = result(judge_rule(decoder.source, decoder.config, states, IDS))
    assert check.value == pytest.approx(found.figures.kld.value, rel=1e-3)


def test_both_are_said_and_the_runtime_is_foretold(grouped: Path, tmp_path: Path) -> None:
    file = file_of(grouped, tmp_path / "x.gguf", "q4_k_m")
    arguments = ["verify", str(file), "--against", str(grouped), "--windows", "1", "--engine", "llama.cpp"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert "ok    runtime's rule   the figures are of the model's rule" in done.output
    assert "ok    engine parity" in done.output
