"""Runs llama.cpp's convert_hf_to_gguf.py with its pre-tokenizer check answered, so that it can be timed.

    python benchmarks/llama_convert.py PATH/convert_hf_to_gguf.py MODEL_FOLDER OUT.gguf

Under transformers 5 the check does not recognise DeepSeek's tokenizers and the converter stops; the name
"deepseek-llm" is given here instead. Nothing else of it is changed.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    script, model, out = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)  # its own packages
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-llm"
    sys.argv = [script, model, "--outtype", "bf16", "--outfile", out]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
