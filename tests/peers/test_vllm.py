"""vLLM on a CPU reads integers of 4 bits, with zero points and without, and gives the logits of our reader.

It runs in an environment of its own, since it wants another transformers: `python3 dev.py peers --vllm` makes
it and names its interpreter. Other widths and small floats have no kernel on a CPU there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from tiny import safetensors_bytes, write_json

from converters.compressed.reader import open_model
from dsconvert.cli import cli
from dsconvert.models.config import load_json

PYTHON = os.environ.get("DSCONVERT_VLLM", "")
pytestmark = pytest.mark.skipif(not PYTHON, reason="needs vLLM: run `python3 dev.py peers --vllm` (3.5 GB)")
# Both round in bf16, the one scales and the other weights; codes of another run are 0.13 apart.
WITHIN = 0.03
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
folder, ids = sys.argv[1], json.loads(sys.argv[2])
model = LLM(model=folder, dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=1)
asked = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
(found,) = model.generate([{"prompt_token_ids": ids}], asked)
print(json.dumps([found.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]))
"""
SETTINGS = {
    "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


def logprobs(folder: Path, ids: list[int]) -> Any:
    """What vLLM gives to each token of a text but the first."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SETTINGS
    command = [PYTHON, "-c", SCRIPT, str(folder), json.dumps(ids)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.array(json.loads(done.stdout.splitlines()[-1]))


OPTIONS = {"symmetric": "", "asymmetric": "--asym", "several groups of settings": "--bpw 4.3 --types w4a16"}


@pytest.mark.parametrize("options", [words.split() for words in OPTIONS.values()], ids=list(OPTIONS))
def test_vllm_gives_the_logits_of_our_readers_weights(tmp_path: Path, options: list[str]) -> None:
    out, dense = tmp_path / "out", tmp_path / "dense"
    text = ("--calib", "builtin", "--calib-samples", "8", "--calib-len", "128", "--effort", "off")
    done = CliRunner().invoke(cli, ["compressed", "sample:", *text, *options, "-o", str(out)])
    assert done.exit_code == 0, done.output
    dense.mkdir()
    for file in out.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (dense / file.name).write_bytes(file.read_bytes())
    config, model = load_json(out / "config.json"), open_model(out)
    del config["quantization_config"]
    write_json(dense / "config.json", config)
    weights = {name: model.float32(name) for name in model.shapes()}
    (dense / "model.safetensors").write_bytes(safetensors_bytes(weights))
    ids = [int(i) for i in np.random.default_rng(0).integers(3, 1900, 96)]
    apart = np.abs(logprobs(out, ids) - logprobs(dense, ids))
    assert apart.mean() < WITHIN, apart
