"""Mean KL of EXL2 at several bit rates over held-out text, beside q4_0, GPTQ and plain rounding to 4 bits.

    python benchmarks/exl2.py MODEL_PATH [--bpw 2.5,3,4,5,6] [--samples 32] [--length 1024] [--damp 0.05]
                              [--work FOLDER]

One measurement serves all bit rates. Per rate: the bits per weight reached, the mean KL divergence and what
the allocation had foretold of it on the calibration text, the seconds, and the process's peak memory so far.
Then the same evaluator on q4_0, on GPTQ at 4 bits with groups of 128, and on the same groups rounded to
nearest between their least and greatest weights. Calibration and evaluation text are the two parts of the
built-in text; nothing is fetched.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.pop(0)  # this folder has a gguf.py, which is not the library
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import calibrated
from held_out import evaluation

from converters.exl2.convert import convert
from converters.exl2.plan import Job, Options, prepare
from converters.exl2.reader import open_model, per_weight
from converters.gguf import convert as gguf
from converters.gguf import output
from converters.gptq import convert as gptq
from converters.gptq import plan as gptq_job
from converters.outputs import open_output
from dsconvert.events import Finished, Step
from dsconvert.proof import compare
from dsconvert.quantization.gptq_solver import round_to_nearest


def kld(job: Job, out: Path) -> tuple[float, float, float]:
    """Mean KL divergence in nats, its standard error, and the share of equal top tokens."""
    opened = open_output(out)
    model = job.model
    found = compare.result(
        compare.compare(
            model.source, opened.source, model.config, evaluation(job), candidate_config=opened.config
        )
    )
    assert found.figures is not None, found.broken
    return found.figures.kld.value, found.figures.kld.error, found.figures.same_top.value


def line(name: str, bits: float, job: Job, out: Path, seconds: float, more: str = "") -> None:
    value, error, top = kld(job, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(
        f"{name:<22} {bits:6.3f} bpw  KLD {value:.5f} +- {error:.5f}  same top {top:.2%}  {seconds:6.1f} s  "
        f"peak {peak:5.0f} MB  {more}",
        flush=True,
    )


def run(events: Any) -> tuple[float, list[Any]]:
    """Seconds, and what happened."""
    started = time.monotonic()
    found = list(events)
    assert any(isinstance(event, Finished) for event in found)
    return time.monotonic() - started, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--bpw", default="2.5,3,4,5,6")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--damp", type=float, default=Options.damp)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = given.work or Path(folder)
        asked: dict[str, Any] = {
            "calib": "builtin", "calib_samples": given.samples, "calib_len": given.length,
            "effort": "off", "force": True,
        }  # fmt: skip
        for bpw in map(float, given.bpw.split(",")):
            options = calibrated.exl2_options(
                given.model, bpw=bpw, damp=given.damp, out=work / f"{bpw}",
                measurement=work / "measurement.json", **asked,
            )  # fmt: skip
            job = prepare(options)
            seconds, events = run(convert(options))
            (more,) = (
                e.text.partition("; ")[2] for e in events if isinstance(e, Step) and "expected" in e.text
            )
            out = work / f"{bpw}"
            line(f"exl2 --bpw {bpw:g}", per_weight(open_model(out)), job, out, seconds, more)
        out = work / "q4_0.gguf"
        seconds, _ = run(
            gguf.convert(output.Options(given.model, outfile=out, quants=("q4_0",), effort="off", force=True))
        )
        line("gguf --quant q4_0", 4.5, job, out, seconds)
        plain = calibrated.gptq_options(given.model, bits=4, group_size=128, out=work / "gptq", **asked)
        job_of = gptq_job.prepare(plain)
        bits = 8 * sum(map(job_of.nbytes, job_of.model.linears)) / job.weights
        seconds, _ = run(gptq.convert(plain))
        line("gptq --bits 4", bits, job, work / "gptq", seconds)
        plain = replace(plain, mse=False, run=replace(plain.run, out=work / "rtn"))
        with mock.patch.object(gptq, "solve", lambda W, H, options, *rest: round_to_nearest(W, options)):
            seconds, _ = run(gptq.convert(plain))
        line("4 bits, to nearest", bits, job, work / "rtn", seconds)


if __name__ == "__main__":
    main()
