"""Mean KL of GPTQ against round-to-nearest on the same grid and against gptqmodel, by one evaluator.

    python benchmarks/gptq_quality.py MODEL_PATH... [--bits 4,3] [--groups 128,64] [--orders natural,static]
                                      [--samples 32] [--length 512] [--windows 16] [--seeds 0]
                                      [--rounds 0,1] [--asym] [--no-mse] [--peer-mse 0] [--no-peer]

Every result is a folder, read back by our reader and compared with the checkpoint block by block over the
same held-out windows in float32. Calibration and evaluation text are the two parts of the built-in text;
nothing is fetched. What is rounded to nearest has the least loss that scales can give it without feedback
(the same search, weighted by the same calibration). gptqmodel gets the same tokens, the same damping and
float32, and searches no scales unless told (--peer-mse 2: for the least squared error); for `static`
(act-order in a file without desc_act) it has its group-aware act-order, for `dynamic` its desc_act. With
several seeds each draws its own calibration windows: on one draw two correct solvers differ by chance, for a
last bit moves a code and the code all that follow, so that the error of a difference is taken over the draws
(with one seed: over the tokens, which says nothing on that). With several `--rounds` of refinement each is
compared with the first, by the ratio of the KL of the same windows and its error over them. Exit code 1 when
ours is not below round-to-nearest, or is above gptqmodel by more than two standard errors. It needs gptqmodel
(see tests/peers) or `--no-peer`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import calibrated
import gptq_peer
import numpy as np
import numpy.typing as npt
from held_out import evaluation

from converters.gptq import convert as flow
from converters.gptq.convert import convert
from converters.gptq.plan import Job, Options, prepare
from converters.gptq.reader import open_model
from dsconvert.models.config import load_config
from dsconvert.models.language_model import language_model
from dsconvert.proof import compare
from dsconvert.quantization.gptq_solver import Solved, SolverOptions, round_to_nearest
from dsconvert.quantization.run import draw

Floats = npt.NDArray[np.float64]
PARTS = 16  # of the held-out text, by which errors of ratios go


def kld(job: Job, folder: Path, windows: int) -> Floats:
    """KL divergence in nats of each prediction over the first held-out windows."""
    held_out = evaluation(job)
    some = replace(held_out, tokens=held_out.tokens[:windows], first=held_out.first[:windows])
    source, config = language_model(open_model(folder), load_config(folder))
    model = job.model
    compared = compare.result(
        compare.compare(model.source, source, model.config, some, candidate_config=config)
    )
    assert compared.tokens is not None, compared.broken
    return compared.tokens.kld


def estimate(values: Floats) -> tuple[float, float]:
    """Mean and standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


@contextmanager
def rounding() -> Iterator[None]:
    """While it lasts, linears are rounded to nearest, on scales that the solver's search finds for that."""

    def solved(W: Any, H: Any, options: SolverOptions, *rest: object) -> Solved:
        return round_to_nearest(W, options, H.diagonal())

    with mock.patch.object(flow, "solve", solved):
        yield


def run(options: Options, windows: int) -> Floats:
    """Convert and compare what stands in the folder."""
    for _ in convert(options):
        pass
    assert options.run.out is not None
    return kld(prepare(options), options.run.out, windows)


def setting(given: argparse.Namespace, model: str, scheme: dict[str, int], folder: Path) -> int:
    """All results of one model, width and group size, a line each; returns how many are worse."""
    shared: dict[str, Any] = {
        **scheme, "out": folder / "out", "calib": "builtin", "calib_samples": given.samples,
        "calib_len": given.length, "mse": not given.no_mse, "sym": not given.asym, "effort": "off",
        "force": True,
    }  # fmt: skip
    head = f"{Path(model).name:<12} {scheme['bits']} bits g{scheme['group_size']:<4}"
    with rounding():
        plain = run(calibrated.gptq_options(model, act_order=False, **shared), given.windows)
    print(f"{head} round to nearest {estimate(plain)[0]:.5f} +- {estimate(plain)[1]:.5f}", flush=True)
    worse = 0
    for order in given.orders.split(","):
        first: Floats | None = None
        for rounds in map(int, given.rounds.split(",")):
            label = f"{head} {order:<8} rounds {rounds}"
            ours, found = solved(given, model, order, folder, label, plain, shared | {"rounds": rounds})
            worse += found
            if first is not None:
                print(f"{label} = {ratio(ours, first)} of the first", flush=True)
            first = ours if first is None else first
    return worse


def ratio(ours: Floats, first: Floats) -> str:
    """The ratio of two mean KL of the same predictions, by draws [draws, n], and its error over windows."""
    a, b = (
        np.array([piece.mean() for piece in np.array_split(part.mean(0), PARTS)]) for part in (ours, first)
    )
    mean = a.mean() / b.mean()
    error = float(np.std(a - mean * b, ddof=1) / math.sqrt(len(a)) / b.mean())
    return f"{mean:.3f} +- {error:.3f}"


def solved(
    given: argparse.Namespace,
    model: str,
    order: str,
    folder: Path,
    label: str,
    plain: Floats,
    shared: dict[str, Any],
) -> tuple[Floats, int]:
    """The KL of each draw of calibration [draws, n], and how many results are worse than they may be."""
    ours, theirs, worse = [], [], 0
    for seed in map(int, given.seeds.split(",")):
        options = calibrated.gptq_options(model, seed=seed, **gptq_peer.ORDERS[order][0], **shared)
        ours.append(run(options, given.windows))
        if not given.no_peer:
            theirs.append(peer(options, folder / f"peer-{order}-{seed}", order, given))
    mean = float(np.mean(ours))
    text = f"{label} ours {mean:.5f} = {mean / plain.mean():.2f} of rounding"
    worse += mean >= plain.mean()
    if theirs:
        apart = np.array(ours) - np.array(theirs)
        difference, error = estimate(apart.mean(1) if len(apart) > 1 else apart[0])
        text += f"; gptqmodel {np.mean(theirs):.5f}; ours - gptqmodel {difference:+.5f} +- {error:.5f}"
        worse += difference > 2 * error
    print(text, flush=True)
    return np.array(ours), worse


def peer(options: Options, out: Path, order: str, given: argparse.Namespace) -> Floats:
    """gptqmodel's result with the same tokens and settings."""
    job = prepare(options)
    tokens = compare.result(draw(job)).tokens
    gptq_peer.quantize(
        job.model.checkpoint.folder, tokens, out, order, bits=options.bits,
        group_size=options.group_size, damp_percent=options.damp, mse=given.peer_mse,
    )  # fmt: skip
    return kld(job, out, given.windows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--groups", default="128,64")
    parser.add_argument("--orders", default="natural,static")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rounds", default="0")
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--no-mse", action="store_true")
    parser.add_argument("--peer-mse", type=float, default=0.0)
    parser.add_argument("--no-peer", action="store_true")
    given = parser.parse_args()
    worse = 0
    for model, bits, group in itertools.product(given.models, given.bits.split(","), given.groups.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            worse += setting(given, model, {"bits": int(bits), "group_size": int(group)}, Path(folder))
    print(f"{worse} results worse than they may be")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
