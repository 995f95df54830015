"""Mean KL of GPTQ against round-to-nearest on the same grid, over held-out text, with one evaluator.

    python benchmarks/gptq.py MODEL_PATH... [--bits 4,3] [--groups 128,64] [--samples 32] [--length 1024]
                              [--gptqmodel]

Per setting: GPTQ without and with act-order (static groups), and round-to-nearest; each with min-max scales,
or with `--mse` searched ones. Also seconds per block and peak memory. `--gptqmodel` adds that package's own
result from the same tokens, where it is installed (with GPTQMODEL_CPU_WORKERS=2, OMP_NUM_THREADS=1).
Calibration and evaluation text are the two parts of the built-in text; nothing is fetched.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from converters.gptq import convert as flow
from converters.gptq.convert import convert, draw
from converters.gptq.job import Job, Options, prepare
from converters.gptq.proof import evaluation
from converters.gptq.reader import open_model
from converters.gptq.solver import round_to_nearest
from dsconvert import verify
from dsconvert.arch import WeightSource
from dsconvert.config import load_config
from dsconvert.inner import language_model


def kld(job: Job, source: WeightSource) -> tuple[float, float]:
    """Mean KL divergence in nats over the held-out windows, and its standard error."""
    compared = verify.result(verify.compare(job.model.source, source, job.model.config, evaluation(job)))
    assert compared.figures is not None, compared.broken
    return compared.figures.kld.value, compared.figures.kld.error


@contextmanager
def rounding() -> Iterator[None]:
    """While it lasts, linears are rounded to nearest on the very grid that the solver would have used."""
    with mock.patch.object(flow, "solve", lambda W, H, options: round_to_nearest(W, options)):
        yield


def run(options: Options) -> tuple[Job, float, float, float]:
    """Convert, and measure: the job, mean KL, its error, seconds without verification."""
    job = prepare(options)
    started = time.monotonic()
    for _ in convert(options):
        pass
    seconds = time.monotonic() - started
    assert options.out is not None
    source, _ = language_model(open_model(options.out), load_config(options.out))
    return job, *kld(job, source), seconds


def peer(options: Options, out: Path) -> tuple[float, float, float]:
    """gptqmodel's own result with the same tokens and settings."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    job = prepare(options)
    tokens = verify.result(draw(job)).tokens
    ids = [torch.from_numpy(row)[None] for row in tokens]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    config = QuantizeConfig(
        bits=options.bits, group_size=options.group_size, desc_act=False, act_group_aware=options.act_order,
        sym=True, damp_percent=options.damp,
    )  # fmt: skip
    started = time.monotonic()
    model = GPTQModel.load(str(job.model.checkpoint.folder), config, device="cpu")
    model.quantize(rows, batch_size=1)
    model.save(str(out))
    seconds = time.monotonic() - started
    return *kld(job, open_model(out)), seconds


def line(name: str, value: float, error: float, seconds: float, layers: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"  {name:<24} {value:.5f} +- {error:.5f}  {seconds / layers:6.2f} s/block  peak {peak:6.0f} MB",
        flush=True,
    )


def settings(given: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    for model, bits, group in itertools.product(given.models, given.bits.split(","), given.groups.split(",")):
        yield model, {"bits": int(bits), "group_size": int(group)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--groups", default="128,64")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--mse", action="store_true")
    parser.add_argument("--gptqmodel", action="store_true")
    given = parser.parse_args()
    worse = 0
    for model, scheme in settings(given):
        print(f"{model} {scheme}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            shared: dict[str, Any] = {
                **scheme, "out": out, "calib": "builtin", "calib_samples": given.samples,
                "calib_len": given.length, "mse": given.mse, "verify": "off", "force": True,
            }  # fmt: skip
            with rounding():
                job, plain, error, seconds = run(Options(model, act_order=False, **shared))
            line("round to nearest", plain, error, seconds, job.model.config.layers)
            for act_order in (False, True):
                options = Options(model, act_order=act_order, **shared)
                job, value, error, seconds = run(options)
                line(
                    "act-order" if act_order else "natural order",
                    value,
                    error,
                    seconds,
                    job.model.config.layers,
                )
                worse += value > plain
                if given.gptqmodel:
                    found = peer(options, Path(folder) / f"peer{act_order}")
                    line("gptqmodel, the same", *found, job.model.config.layers)
    print(f"{worse} settings worse than round to nearest")
    return 1 if worse else 0


if __name__ == "__main__":
    raise SystemExit(main())
