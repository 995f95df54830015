"""Mean KL of GGUF files at equal bytes: plain, by importance matrix, by error feedback, by knapsack, by both.

    python benchmarks/better_gguf.py [MODEL_PATH] [--quants q5_k_m,q4_k_m,q4_0,q3_k_m,q2_k] [--draws 2]
                                     [--samples 24] [--length 512] [--windows 48] [--rounds N] [--no-knapsack]
                                     [--llama-cpp] [--padded] [--kills 20]

For each type: the file of llama-quantize without and with an importance matrix, the same types and bytes with
--solver gptq, and at most as many bytes by --size, without and with the solver. Each draw is one set of
calibration windows (its own seed); evaluation windows are two runs of the built-in evaluation text, 256
tokens each, with all predictions scored. Every file is read back by our reader and compared with the
checkpoint in float32. Brackets: of the importance matrix's file; the error is that of the ratio, by 500
resamples of the windows, paired. --llama-cpp has every file run by llama.cpp as `dsconvert verify --engine
llama.cpp` does. Exit code 1 where a file of error feedback is not closer than the importance matrix's, where
a tensor of it has a greater loss on the evaluation text, or where llama.cpp is farther than foretold.

--padded takes SmolLM2-135M (tests/support/smollm2.py), whose weights are a Q4_1 file's: they get uniform
noise of one of its steps. Its 576 inputs are no multiple of 256, so hidden states get 192 of each 256 places,
and every third of the four heads of a group stays a zero one: the same function, whose k-quants are used. A
quarter of each super-block is free, so only ratios count. --dithered is the same model at its own width.

--kills N kills a run of a tiny model at N random moments with SIGKILL and resumes it: the bytes must be those
of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder has a gguf.py, which is not the library
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

import calibrated
import numpy as np
import numpy.typing as npt
import smollm2
import tiny

from converters.gguf.convert import convert
from converters.gguf.opened import open_file
from converters.gguf.parse import open_gguf
from converters.outputs import open_reference
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.models.weights import WeightSource
from dsconvert.proof import compare
from dsconvert.proof.options import ProofOptions
from dsconvert.proof.prove import prove
from dsconvert.proof.sources import Reference
from dsconvert.proof.text import builtin_page
from dsconvert.texts.windows import Windows, consecutive, whole

Floats = npt.NDArray[np.float64]
LENGTH = 256  # tokens of an evaluation window
RESAMPLES = 500
LIVE, PLACES = 192, 256  # of the places of a super-block, those that are in use when padded


@dataclass(frozen=True)
class Given:
    """What is measured, and on which text."""

    reference: Reference
    windows: Windows
    samples: int
    length: int
    rounds: int | None
    llama_cpp: bool
    folder: Path


def evaluation(reference: Reference, count: int) -> Windows:
    """So many windows of the built-in evaluation text, every prediction scored."""
    tokenizer = reference.tokenizer
    length = min(LENGTH, reference.config.context_length)
    page = builtin_page(tokenizer.encode, count * length)
    ids = np.array(tokenizer.encode([page])[0][: count * length], np.int64)
    return whole(consecutive(ids, length, tokenizer.first_id).tokens)


def by_window(given: Given, path: Path) -> Floats:
    """The mean KL divergence over each evaluation window."""
    opened, reference = open_file(path), given.reference
    found = compare.result(
        compare.compare(
            reference.source, opened.source, reference.config, given.windows, candidate_config=opened.config
        )
    )
    assert found.tokens is not None, found.broken
    return found.tokens.kld.reshape(len(given.windows.tokens), -1).mean(1)


def ratio(over: list[Floats], under: list[Floats]) -> tuple[float, float]:
    """The ratio of two means over all draws, and its error by resampling windows, the same of both."""
    above, below = np.mean(over, 0), np.mean(under, 0)
    rng = np.random.default_rng(0)
    picked = rng.integers(0, len(above), (RESAMPLES, len(above)))
    return float(above.mean() / below.mean()), float((above[picked].mean(1) / below[picked].mean(1)).std())


def made(
    given: Given, out: Path, quants: tuple[str, ...], seed: int, plain: bool = False, **more: Any
) -> dict[str, Path]:
    """Convert, and return the file of each type; a `plain` one without calibration."""
    text = {"calib": "builtin", "calib_samples": given.samples, "calib_len": given.length, "seed": seed}
    options = calibrated.gguf_options(
        given.reference.name, *quants, out=out, effort="off", force=True, **text, **more
    )
    options = replace(options, calibration=None) if plain else options
    several = len(quants) > 1
    paths = {quant: out.with_name(f"{out.stem}-{quant}.gguf") if several else out for quant in quants}
    if all(path.exists() for path in paths.values()):
        return paths
    started = time.monotonic()
    for _ in convert(options):
        pass
    print(f"# {out.stem} {', '.join(quants)}: {time.monotonic() - started:.0f} s", flush=True)
    return paths


def tensor_nbytes(path: Path) -> int:
    """Bytes of all tensors; the keys of the files differ."""
    return sum(tensor.nbytes for tensor in open_gguf(path).tensors.values())


def own_losses(given: Given, paths: dict[str, Path]) -> dict[str, dict[str, float]]:
    """tr(E H E^T) of linears and head of every file, by its file's name; H of the evaluation text."""
    reference, losses = given.reference, {name: dict[str, float]() for name in paths}
    sources: dict[str, WeightSource] = {name: open_file(path).source for name, path in paths.items()}
    device = st.pick_device("cpu")
    decoder = st.open_decoder(reference.source, reference.config, device, st.pick_dtype(None, device))
    hidden = linear_inputs.embed(decoder, given.windows.tokens)

    def groups() -> Iterator[linear_inputs.Group]:
        for index in range(reference.config.layers):
            yield from block_walk.walk(decoder, st.load_block(decoder, index), hidden, fixed=True)
        head = linear_inputs.measure_head(decoder, hidden, st.read(decoder, st.NORM).to(decoder.dtype))
        yield replace(head, linears={decoder.head: head.linears[st.HEAD]})

    for group in groups():
        if group.moment.ndim == 3:  # latent attention's keys by the queries: they came by what makes them
            continue
        H = group.moment.numpy()
        for name in group.names:
            W = reference.source.float32(name)
            for file, source in sources.items():
                E = W - source.float32(name)
                losses[file][name] = float(((E @ H) * E).sum(dtype=np.float64))
    return losses


def in_llama_cpp(given: Given, path: Path) -> tuple[float, float, bool]:
    """KL divergence by the proof, that of llama.cpp, and whether every check held."""
    asked = ProofOptions(windows=12, engine="llama.cpp")
    proof = compare.result(prove(open_file(path), given.reference, asked))
    found = proof.as_dict()
    own, engine = found["figures"]["kld"]["value"], found["engine"]["figures"]["kld"]["value"]
    return own, engine, proof.verdict.passed


@dataclass(frozen=True)
class Files:
    """The files of one draw, by column and type."""

    columns: dict[str, dict[str, Path]]


def draw(given: Given, quants: tuple[str, ...], seed: int, knapsack: bool) -> Files:
    """Every file of one draw of calibration windows."""
    folder = given.folder
    columns = {
        "plain": made(given, folder / "plain.gguf", quants, seed, solver="imatrix", plain=True),
        "imatrix": made(given, folder / f"imatrix-{seed}.gguf", quants, seed, solver="imatrix"),
        "feedback": made(given, folder / f"feedback-{seed}.gguf", quants, seed, rounds=given.rounds),
    }
    if knapsack:
        from converters.gguf.budget import Budget

        measurement = folder / f"measurement-{seed}"
        for column, solver in (("knapsack", "imatrix"), ("both", "gptq")):
            columns[column] = {}
            for quant in quants:
                size = columns["imatrix"][quant].stat().st_size
                budget = Budget(size=size, measurement=measurement.with_suffix(f".{solver}.json"))
                out = folder / f"{column}-{seed}-{quant}.gguf"
                more: dict[str, Any] = {"rounds": given.rounds} if solver == "gptq" else {}
                columns[column] |= {
                    quant: made(given, out, ("q4_k_m",), seed, solver=solver, budget=budget, **more)["q4_k_m"]
                }
    return Files(columns)


def row(given: Given, quant: str, files: list[Files]) -> bool:
    """Print a line of the table; whether feedback is closer and no tensor has a greater loss."""
    found = {
        column: [by_window(given, one.columns[column][quant]) for one in files] for column in files[0].columns
    }
    base = found["imatrix"]
    size = tensor_nbytes(files[0].columns["imatrix"][quant])
    cells = [f"{quant} | {size / 1e6:.3f}"]
    for column, values in found.items():
        times, error = ratio(values, base)
        share = "" if column == "imatrix" else f" ({times:.2f} ± {error:.2f})"
        cells.append(f"{np.mean(values):.5f}{share}")
    print("| " + " | ".join(cells) + " |", flush=True)
    good = float(np.mean(found["feedback"])) < float(np.mean(base))
    for one in files:
        pair = {name: one.columns[name][quant] for name in ("imatrix", "feedback")}
        losses = own_losses(given, pair)
        worse = [n for n, loss in losses["feedback"].items() if loss > losses["imatrix"][n]]
        most = max(loss / max(losses["imatrix"][n], 1e-30) for n, loss in losses["feedback"].items())
        print(f"# {quant}: the worst linear's loss is {most:.2f} of the importance matrix's; worse: {worse}")
        good = good and not worse
        if "both" in one.columns and tensor_nbytes(one.columns["both"][quant]) > size + 2048:
            print(f"# {quant}: the knapsack's file is larger")
            good = False
    if given.llama_cpp:
        for column in found:
            own, engine, passed = in_llama_cpp(given, files[0].columns[column][quant])
            print(f"# {quant} {column}: KL by verify {own:.5f}, in llama.cpp {engine:.5f}, {passed=}")
            good = good and passed
    return good


def padded(model: Path, out: Path) -> Path:
    """SmolLM2 at hidden size 768, with 192 places of each 256 in use, and 12 heads: the same function."""
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden = config["hidden_size"] * PLACES // LIVE
    heads = config["num_attention_heads"] * PLACES // LIVE
    tensors = load_file(model / "model.safetensors")

    def spread(x: torch.Tensor, axis: int) -> torch.Tensor:
        """192 of each 256 places along an axis."""
        x = x.transpose(0, axis)
        parts = x.reshape(-1, LIVE, *x.shape[1:])
        room = x.new_zeros(len(parts), PLACES, *x.shape[1:])
        room[:, :LIVE] = parts
        return room.reshape(-1, *x.shape[1:]).transpose(0, axis).contiguous()

    for name, x in tensors.items():
        if name.endswith("norm.weight"):
            tensors[name] = spread(x.float() * (LIVE / PLACES) ** 0.5, 0)
            continue
        # Columns of what reads hidden states, and of o_proj, which reads heads; rows of what writes them.
        wider = x if name.endswith("down_proj.weight") else spread(x, 1)
        rows = name.endswith(("q_proj.weight", "o_proj.weight", "down_proj.weight"))
        tensors[name] = spread(wider, 0) if rows else wider
    numbers = {"hidden_size": hidden, "num_attention_heads": heads, "head_dim": hidden // heads}
    numbers["rms_norm_eps"] = config["rms_norm_eps"] * LIVE / PLACES
    out.mkdir()
    for path in model.iterdir():
        if path.suffix == ".json":
            (out / path.name).write_bytes(path.read_bytes())
    (out / "config.json").write_text(json.dumps(config | numbers), encoding="utf-8")
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def prepared(given: argparse.Namespace, folder: Path) -> str:
    """The model that is asked for."""
    if not (given.padded or given.dithered):
        return str(given.model)
    model = folder / "dithered"
    if not model.exists():
        smollm2.dithered(smollm2.make(folder / "hf", folder), model)
    if not given.padded:
        return str(model)
    return str(folder / "padded" if (folder / "padded").exists() else padded(model, folder / "padded"))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="sample:")
    parser.add_argument("--quants", default="q5_k_m,q4_k_m,q4_0,q3_k_m,q2_k")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--no-knapsack", action="store_true")
    parser.add_argument("--llama-cpp", action="store_true")
    parser.add_argument("--padded", action="store_true")
    parser.add_argument("--dithered", action="store_true")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--kills", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.work or Path(temporary)
        folder.mkdir(exist_ok=True)
        if asked.kills:
            model = tiny.tiny_checkpoint(folder / "model", layers=6, d=128, ff=352)
            resumed = calibrated.killed_and_resumed("gguf", model, folder, asked.kills)
            print(
                f"{asked.kills} kills, {resumed} of them went on from finished blocks, all to the same bytes"
            )
            return 0
        reference = open_reference(prepared(asked, folder))
        windows = evaluation(reference, 2 * asked.windows)
        given = Given(reference, windows, asked.samples, asked.length, asked.rounds, asked.llama_cpp, folder)
        quants = tuple(asked.quants.split(","))
        files = [draw(given, quants, seed, not asked.no_knapsack) for seed in range(asked.draws)]
        print(f"| size of | MB | {' | '.join(files[0].columns)} |", flush=True)
        good = [row(given, quant, files) for quant in quants]
        return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
