"""Compares a checkpoint's tokenizer, the one rebuilt from its GGUF keys, and llama.cpp's, on random texts.

    python benchmarks/tokenizer_fuzz.py CHECKPOINT_FOLDER --rows 102400 --count 200000 --llamacpp

Prints how many texts differ and of which class they are, with the smallest examples. llama.cpp runs in a
process of its own (it can crash on long unbroken runs); a text that kills it counts as the class "crash".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose gguf.py hides the library

from tokenizer_tools import parity
from tokenizer_tools.load import TokenizerData, load_tokenizer
from tokenizer_tools.pretokenizer import gguf_keys, rebuild, resolve

CRASH = [-1]


class Worker:
    """llama.cpp's tokenizer in a process of its own; texts and ids go as JSON lines. Ids -1: it crashed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.process = self._start()
        self.crashes: list[str] = []

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--worker", str(self.path)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            return self._ask(texts)
        except (BrokenPipeError, ValueError):
            self.process.wait()
            self.process = self._start()
        if len(texts) > 1:
            return [ids for text in texts for ids in self([text])]
        self.crashes.append(texts[0])
        return [CRASH]

    def _ask(self, texts: Sequence[str]) -> list[list[int]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(list(texts)) + "\n")
        self.process.stdin.flush()
        answer: list[list[int]] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def serve(path: str) -> None:
    """The worker's side: one JSON line of texts in, one of ids out, until the input ends."""
    from dsconvert.runtimes.llamacpp import Engine

    with Engine(path, vocab_only=True) as engine:
        for line in sys.stdin:
            print(
                json.dumps([engine.tokenize(text, parse_special=True) for text in json.loads(line)]),
                flush=True,
            )


def write_vocabulary(path: Path, keys: dict[str, tuple[str, Any]], rows: int) -> None:
    """A GGUF file with the tokenizer alone, as llama.cpp loads with vocab_only."""
    from gguf import GGUFValueType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    numbers = {"block_count": 1, "context_length": 512, "embedding_length": 64, "vocab_size": rows}
    numbers |= {"feed_forward_length": 64, "attention.head_count": 1, "rope.dimension_count": 64}
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    for name, (kind, value) in keys.items():
        outer, _, inner = kind.partition(":")
        sub = GGUFValueType[inner.upper()] if inner else None
        writer.add_key_value(name, value, GGUFValueType[outer.upper()], sub)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def texts(data: TokenizerData, seed: int, count: int) -> Iterator[str]:
    """Random texts; the added tokens inside are those that both sides match the same way in a text."""
    return parity.random_texts(seed, count, [token.content for token in data.added])


def report(title: str, result: parity.Comparison, seconds: float) -> None:
    print(f"{title}: {result.different:,} of {result.texts:,} texts differ ({seconds:.0f} s)")
    for kind, count in result.classes.items():
        print(f"  {count:7,}  {kind}")
    for kind, text, a, b in result.examples:
        print(f"           {kind}: {text!a}: {list(a)} / {list(b)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, help="rows of the embedding")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--llamacpp", action="store_true", help="compare with llama.cpp, too (needs xllamacpp)"
    )
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="a real text file, line by line"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return serve(options.worker)
    data = load_tokenizer(options.folder, options.rows)
    resolution = resolve(data)
    print(f"{resolution.name}: {resolution.evidence}")
    keys = gguf_keys(data, resolution.name)
    own = parity.encoder(data.tokenizer)
    alone = {
        k: v for k, (_, v) in keys.items() if k not in ("tokenizer.huggingface.json", "tokenizer.ggml.pre")
    }
    start = time.monotonic()
    result = parity.compare_ids(own, parity.encoder(rebuild(alone)), texts(data, options.seed, options.count))
    report("rebuilt from the GGUF keys", result, time.monotonic() - start)
    if options.llamacpp:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocabulary.gguf"
            write_vocabulary(path, keys, options.rows)
            against_llamacpp(path, data, own, options)
    return None


def against_llamacpp(
    path: Path, data: TokenizerData, own: parity.Encoder, options: argparse.Namespace
) -> None:
    worker = Worker(path)
    start = time.monotonic()
    result = parity.compare_ids(own, worker, texts(data, options.seed, options.count))
    report("llama.cpp on random texts", result, time.monotonic() - start)
    for file in options.text:
        lines = file.read_text("utf-8").splitlines(keepends=True)
        start = time.monotonic()
        report(f"llama.cpp on {file.name}", parity.compare_ids(own, worker, lines), time.monotonic() - start)
    print(f"llama.cpp crashed on {len(worker.crashes)} texts")
    worker.close()


if __name__ == "__main__":
    main()
