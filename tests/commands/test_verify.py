"""`dsconvert verify` and `compare` as a user meets them: exit codes, files, every kind of output."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from click.testing import CliRunner, Result
from hub_server import Hub, client_environment, serving
from text_files import gzipped, parquet

from converters.gguf.parse import open_gguf
from dsconvert.checkpoints.locate import locate
from dsconvert.cli import cli
from dsconvert.proof import effort, logprob_file, prove
from dsconvert.texts import builtin
from dsconvert.texts.sets import SETS

pytest.importorskip("torch")
PEERS = Path(__file__).parents[3] / "shared" / "data" / "peers"
needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install xllamacpp"
)


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("files") / "sample.gguf"
    quants = ("f32", "q8_0", "q4_0")
    made = command("gguf", "sample:", "-q", ",".join(quants), "-o", out, "--effort", "off", "--threads", 2)
    assert made.exit_code == 0, made.output
    return {quant: out.with_name(f"sample-{quant}.gguf") for quant in quants}


def test_a_pass_shows_figures_and_writes_both_reports(files: dict[str, Path], tmp_path: Path) -> None:
    out, page = tmp_path / "proof.json", tmp_path / "proof.html"
    options = ("--windows", 2, "--json", out, "--report", page)
    result = command("verify", files["q8_0"], "--against", "sample:", *options)
    assert result.exit_code == 0, result.output
    for name in ("Mean PPL(Q)", "Mean PPL(Q)/PPL(base)", "Mean KLD", "99.9 % KLD", "Same top p", "RMS Δp"):
        assert name in result.stdout
    assert "PASS  sample-q8_0.gguf against sample" in result.stdout
    found = json.loads(out.read_text())
    assert found["passed"] is True
    assert 0 < found["figures"]["kld"]["value"] < 0.005
    assert found["figures"]["tokens"] == 2 * 511
    assert 1 < found["figures"]["bits_per_byte"] < 2.5
    assert found["provenance"]["text"].startswith("builtin")
    html = page.read_text()
    assert "PASS" in html
    assert "Worst tokens" in html
    for check in found["checks"]:
        assert f"<td>ok</td><td>{check['name']}</td>" in html


def test_an_f32_file_is_the_checkpoint(files: dict[str, Path]) -> None:
    result = command("verify", files["f32"], "--against", "sample:", "--windows", 1, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["figures"]["kld_max"] == 0.0
    assert found["figures"]["ppl_ratio"]["value"] == 1.0
    assert all(tensor["equal"] for tensor in found["tensors"])
    assert found["provenance"]["reference"] == "sample:"  # not where this machine has it installed
    assert str(locate("sample:").parent) not in result.stdout


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("--max-kld", 1e-6, "mean KLD"),
        ("--max-ppl-ratio", 0.5, "PPL ratio"),
        ("--min-top1", 1.0, "same top p"),
    ],
)
def test_each_limit_can_fail_the_build(files: dict[str, Path], option: str, value: float, name: str) -> None:
    result = command(
        "verify", files["q4_0"], "--against", "sample:", "--windows", 1, option, value, "--json", "-"
    )
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    assert [check["name"] for check in found["checks"] if not check["passed"]] == [name]
    assert "FAIL" in result.stderr


def test_what_cannot_be_compared_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    other = tiny.tiny_checkpoint(tmp_path / "other", layers=1, d=64, ff=128)
    import torch
    from safetensors.torch import load_file, save_file

    odd = tmp_path / "odd"
    shutil.copytree(other, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "odd"}}))
    weights = load_file(odd / "model.safetensors")
    packed = weights.pop("model.layers.0.mlp.up_proj.weight").view(torch.int32)
    save_file({**weights, "model.layers.0.mlp.up_proj.qweight": packed}, odd / "model.safetensors")
    (tmp_path / "short.txt").write_text("Too short.")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(files["q8_0"].read_bytes()[:-100])
    for arguments, said in (
        ((tmp_path / "none.gguf", "--against", "sample:"), "no such file or folder"),
        ((files["q8_0"], "--against", other), "not the same model"),
        ((files["q8_0"], "--against", tmp_path / "nothing"), "does not exist"),
        ((odd, "--against", other), "'odd'"),
        ((cut, "--against", "sample:"), "cut short or damaged"),
        ((other, "--against", other, "--engine", "llama.cpp"), "runs GGUF files"),
        ((files["q8_0"], "--against", "sample:", "--text", tmp_path / "short.txt"), "tokens"),
        ((files["q8_0"], "--against", "sample:", "--device", "tpu"), "'tpu' is unknown"),
    ):
        result = command("verify", *arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert said in result.stderr, result.stderr
        assert "Traceback" not in result.output


def test_a_text_file_of_the_users(files: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "page.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, again and again. " * 60, encoding="utf-8")
    result = command(
        "verify", files["q8_0"], "--against", "sample:", "--text", text, "--length", 64, "--stride", 32,
        "--windows", 3, "--json", "-",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["figures"]["tokens"] == 63 + 32 + 32


def test_a_file_of_base_log_probabilities(files: dict[str, Path], tmp_path: Path) -> None:
    base = tmp_path / "base.kld"
    ask = ("verify", files["q4_0"], "--against", "sample:", "--windows", 2, "--length", 128, "--json", "-")
    written, read = (command(*ask, "--kld-base", base) for _ in range(2))
    assert (written.exit_code, read.exit_code) == (0, 0), written.output + read.output
    opened = logprob_file.open_base(base)
    assert opened.windows.tokens.shape == (2, 128)
    assert np.all(opened.windows.first == 64)
    first, second = (json.loads(result.stdout) for result in (written, read))
    assert first["tensors"]
    assert second["tensors"] == []  # only the checkpoint's probabilities are at hand
    assert first["figures"]["tokens"] == second["figures"]["tokens"] == 2 * 63
    assert second["figures"]["kld"]["value"] == pytest.approx(first["figures"]["kld"]["value"], rel=0.02)


def test_quick_on_a_small_model_says_what_it_ran(files: dict[str, Path]) -> None:
    result = command("verify", files["q8_0"], "--against", "sample:", "--effort", "quick", "--windows", 2)
    assert result.exit_code == 0, result.output
    assert re.search(r"verifying all 2 blocks over 2 windows of 512 tokens", result.stderr)


def test_a_bf16_copy_of_the_checkpoint(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(locate("sample:"), copy)
    assert command("verify", copy, "--against", "sample:", "--windows", 1).exit_code == 0
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "{{ 'hello' }}"}))
    changed = command("verify", copy, "--against", "sample:", "--windows", 1)
    assert changed.exit_code == 3
    assert "chat template differs" in changed.stderr


def test_a_strangers_file_is_read_by_its_standard_keys(files: dict[str, Path], tmp_path: Path) -> None:
    """No key of ours: the tokenizer is rebuilt by the runtime's own regexes, the type from the tensors."""
    data = files["q8_0"].read_bytes()
    for key in (b"dsconvert.", b"tokenizer.huggingface.json", b"general.file_type"):
        assert key in data
        data = data.replace(key, key[:-4] + b"zzz" + key[-1:])
    stranger = tmp_path / "stranger.gguf"
    stranger.write_bytes(data)
    result = command("verify", stranger, "--against", "sample:", "--windows", 1)
    assert result.exit_code == 0, result.output
    assert "GGUF q8_0" in result.stderr


def test_llama3_frequencies_are_read_back(tmp_path: Path) -> None:
    """The file holds them as a tensor of divisors; forgetting it would change every angle."""
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    model = tiny.tiny_checkpoint(tmp_path / "m", layers=1, d=64, ff=128, rope="old")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    out = tmp_path / "m.gguf"
    assert command("gguf", model, "-q", "f32", "-o", out, "--effort", "off").exit_code == 0
    ask = ("verify", out, "--against", model, "--windows", 1, "--length", 32, "--json", "-")
    result = command(*ask)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["figures"]["kld"]["value"] < 1e-9
    (model / "config.json").write_text(json.dumps(config))
    changed = command(*ask)
    assert changed.exit_code == 3
    assert "RoPE scaling" in changed.stderr


@pytest.mark.skipif(not PEERS.is_dir(), reason="needs ../shared/data/peers, GPTQ folders of other tools")
@pytest.mark.parametrize("name", ["gptq_gptqmodel_4b_g128", "gptq_autoround_4b_g128"])
def test_gptq_folders_of_other_tools(name: str) -> None:
    result = command("verify", PEERS / name, "--against", PEERS / "tiny256", "--windows", 2, "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {size["type"] for size in found["sizes"]} >= {"gptq4"}
    assert 0 < found["figures"]["kld"]["value"] < 0.01


@needs_llamacpp
def test_the_real_runtime_agrees(files: dict[str, Path]) -> None:
    ask = ("--against", "sample:", "--windows", 2, "--engine", "llama.cpp", "--json", "-")
    for quant in ("f32", "q8_0"):
        result = command("verify", files[quant], *ask)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)
        checks = {check["name"]: check for check in found["checks"]}
        names = ("ids", "BOS", "template", "PPL", "KLD", "parity")
        assert {f"engine {name}" for name in names} <= set(checks)
        assert checks["engine PPL"]["value"] == pytest.approx(found["figures"]["ppl"]["value"], rel=5e-3)
        engine = found["engine"]
        assert engine["name"] == "llama.cpp"
        assert engine["figures"]["tokens"] == found["figures"]["tokens"]
        ratio = engine["figures"]["ppl"]["value"] / found["figures"]["ppl"]["value"]
        assert engine["ppl_to_weights"]["value"] == pytest.approx(ratio)
        parity, rounding = engine["parity"], engine["rounding"]
        assert parity["ppl_base"]["value"] == pytest.approx(engine["predicted"]["ppl"]["value"])
        assert rounding["ppl_base"]["value"] == pytest.approx(found["figures"]["ppl"]["value"], rel=1e-6)
        assert abs(parity["ppl_ratio"]["value"] - 1) < 1e-3
        if quant == "f32":  # nothing is rounded
            assert checks["engine KLD"]["value"] < 1e-5
            assert rounding["kld"]["value"] == 0.0
            assert parity["kld"]["value"] < 1e-9
        else:
            assert rounding["kld"]["value"] > 1e-5


@needs_llamacpp
def test_the_real_runtime_shows_what_another_name_does(files: dict[str, Path], tmp_path: Path) -> None:
    """The name of another pre-tokenizer: the file's own regexes, its config and weights are as before."""
    data = files["q8_0"].read_bytes()
    key = b"tokenizer.ggml.pre"
    assert data.count(key) == 1
    at = data.index(key) + len(key) + 12
    assert data[at : at + 12] == b"deepseek-llm"
    changed = tmp_path / "pre.gguf"
    changed.write_bytes(data[:at] + b"jina-v5-nano" + data[at + 12 :])
    result = command("verify", changed, "--against", "sample:", "--windows", 1, "--engine", "llama.cpp")
    assert result.exit_code == 3, result.output
    assert "llama.cpp's token ids differ" in result.stderr


@pytest.mark.parametrize("name", ["c4", "wikitext2"])
def test_texts_of_the_literature_from_the_hub(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Their validation and test files, fetched once by the command itself, in a process of its own."""
    chosen = next(one for one in SETS if one.name == name)
    held = chosen.files["evaluation"]
    pages = [builtin.evaluation_page(4000 * n)[-4000:] for n in range(1, 9)]
    content = gzipped(pages) if name == "c4" else parquet(tmp_path / "p", {"text": pages}).read_bytes()
    with serving(Hub({"datasets/" + chosen.repository: {held: content}})) as hub:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        words = ["verify", files["q8_0"], "--against", "sample:", "--text", name]
        done = [
            subprocess.run(
                [sys.executable, "-m", "dsconvert", *map(str, words), "--length", "128", "--windows", "3",
                 "--stride", "128", "--json", "-", *more],
                env=environment | client_environment(hub.url, tmp_path / "home"),
                capture_output=True, text=True, check=False, timeout=600,
            )
            for more in ([], ["--quiet"])
        ]  # fmt: skip
        assert hub.methods().count("GET") == 1, "the second run takes the cached file"
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (json.loads(one.stdout) for one in done)
    assert first["provenance"]["text"].startswith(name)
    assert first["figures"]["tokens"] == 3 * 127
    assert first["figures"] == second["figures"]


def test_compare_puts_outputs_side_by_side(files: dict[str, Path], tmp_path: Path) -> None:
    out, page = tmp_path / "all.json", tmp_path / "all.html"
    result = command(
        "compare", files["q4_0"], files["q8_0"], "--against", "sample:", "--windows", 1, "--json", out,
        "--report", page,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["output", "sample-q4_0.gguf", "sample-q8_0.gguf"]
    assert [row[-1] for row in rows[1:]] == ["pass", "pass"]
    first, second = json.loads(out.read_text())["outputs"]
    assert first["nbytes"] == files["q4_0"].stat().st_size
    assert 4.5 < first["bits_per_weight"] < 5.5
    assert 8.4 < second["bits_per_weight"] < 8.6
    assert first["figures"]["kld"]["value"] > 10 * second["figures"]["kld"]["value"]
    assert math.isclose(first["figures"]["ppl_base"]["value"], second["figures"]["ppl_base"]["value"])
    html = page.read_text()
    assert "<svg" in html
    assert ">sample-q8_0.gguf<" in html  # in the table
    assert ">q8_0<" in html  # in the plot, without what both names share


def test_compare_says_whose_checks_they_are(files: dict[str, Path]) -> None:
    both = files["q4_0"], files["q8_0"]
    lines = command("compare", *both, "--against", "sample:", "--windows", 1).stdout.splitlines()
    heads = [lines.index(f"{path}:") for path in both]
    checks = [number for number, line in enumerate(lines) if "mean KLD " in line and line.startswith("ok")]
    assert heads[0] < checks[0] < heads[1] < checks[1]


def test_compare_fails_when_one_fails(files: dict[str, Path]) -> None:
    limit = ("--max-kld", 0.001)
    result = command(
        "compare", files["q4_0"], files["q8_0"], "--against", "sample:", "--windows", 1, "--quiet", *limit
    )
    assert result.exit_code == 3
    assert [line.split()[-1] for line in result.stdout.splitlines()] == ["verdict", "FAIL", "pass"]


def test_the_check_after_a_conversion_says_what_it_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = command("gguf", "sample:", "-q", "q8_0", "-o", tmp_path / "a.gguf")
    assert result.exit_code == 0, result.output
    assert re.search(r"verifying all 2 blocks over 8 windows of 512 tokens", result.stderr)
    assert "mean KLD" in result.stdout
    monkeypatch.setattr(prove, "free_memory", lambda: 1e6)
    monkeypatch.setattr(effort, "QUICK_SECONDS", 0.0)  # as if the sample were big
    short = command("gguf", "sample:", "-q", "q8_0", "-o", tmp_path / "b.gguf")
    assert short.exit_code == 0, short.output
    assert "no blocks and no logits: two decoder blocks need" in short.stderr
    assert "weights" in short.stdout  # sampled rows are compared all the same
    assert "mean KLD" not in short.stdout
    full = command("gguf", "sample:", "-q", "q8_0", "-o", tmp_path / "c.gguf", "--effort", "full")
    assert "mean KLD" in full.stdout


def test_a_sample_of_blocks_has_no_figures_and_still_finds_defects(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effort, "QUICK_SECONDS", 0.0)  # so that only a sample fits
    ask = ("--against", "sample:", "--effort", "quick", "--json", "-")
    result = command("verify", files["q8_0"], *ask)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["figures"] is None
    assert {"token ids", "weights", "blocks"} <= {check["name"] for check in found["checks"]}
    assert len(found["tensors"]) == 21  # all of them
    data = bytearray(files["q8_0"].read_bytes())
    tensor = open_gguf(files["q8_0"]).tensors["output.weight"]
    data[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(data)
    failed = command("verify", bad, *ask)
    assert failed.exit_code == 3
    assert "lm_head.weight: signal to noise 0.0 dB" in failed.stderr


@needs_llamacpp
def test_the_reference_is_run_once_more_where_its_states_are_not_at_hand(
    files: dict[str, Path], tmp_path: Path
) -> None:
    ask = ("verify", files["q8_0"], "--against", "sample:", "--windows", 2, "--length", 64, "--json", "-")
    engine = ("--engine", "llama.cpp", "--kld-base", tmp_path / "base.kld")
    kept, again = (json.loads(command(*ask, *engine).stdout)["engine"]["figures"] for _ in range(2))
    assert again["kld"]["value"] == pytest.approx(kept["kld"]["value"], rel=1e-4)
    assert again["ppl_base"]["value"] == pytest.approx(kept["ppl_base"]["value"], rel=1e-6)
