"""How far faithful outputs of every type lie from plain rounding to nearest, and how far zeroed linears do.

    python benchmarks/limits.py MODEL [MODEL ...]

Each model is made into outputs of every type, plain, with an importance matrix and with error feedback, and
each linear Q of its blocks is held against N, what plain rounding to its own type makes of the checkpoint's
W. Printed per output, over its linears: the dB of signal to noise that it loses against N; the ratio of
tr((W-Q) H (W-Q)^T) to tr((W-N) H (W-N)^T) on held-out text; and the same ratio of a linear that is all zero,
the least and the median. A limit belongs between the largest of the second and the least of the third.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from held_out import held_out

from converters.outputs import open_output, open_reference
from dsconvert.cli import cli
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.proof.sources import Opened, Reference
from tokenizer_tools.library import ids

Doubles = npt.NDArray[np.float64]
Words = tuple[object, ...]
WINDOWS, BLOCKS = 8, 6
TEXT: Words = ("--calib", "builtin", "--calib-samples", 16, "--calib-len", 256)
PLAIN = (
    "q8_0",
    "q6_k",
    "q5_k_s",
    "q5_0",
    "q4_k_s",
    "q4_0",
    "q4_1",
    "q3_k_s",
    "q2_k",
    "iq4_xs",
    "tq2_0",
)
WEIGHTED = (*PLAIN[1:-1], "iq4_nl", "iq3_s", "iq3_xxs")
SOLVED: tuple[Words, ...] = (
    *(("gptq", "-b", bits, "-g", group) for bits in (8, 4, 3, 2) for group in (32, 128, -1)),
    *(("gptq", "-b", bits, "-g", 64, "--no-mse") for bits in (4, 2)),
    *(("gptq", "-b", bits, "-g", 64, "--asym") for bits in (4, 2)),
    ("gptq", "-b", 2, "-g", 32, "--act-order"),
    *(("exl2", "-b", rate) for rate in (2.5, 3, 4, 6)),
)


def outputs() -> Iterator[Words]:
    """The command of every output, without model and place."""
    yield from (("gguf", "-q", quant, "--pure") for quant in PLAIN)
    yield from (("gguf", "-q", quant, "--pure", *TEXT) for quant in WEIGHTED)
    yield from ((*words, *TEXT) for words in SOLVED)


def moments(reference: Reference) -> dict[str, Doubles]:
    """2/n X^T X of the inputs of each linear of the first blocks, on held-out text, by tensor name."""
    import torch

    tokenizer = reference.tokenizer
    text = held_out(lambda texts: ids(tokenizer.tokenizer, texts), reference.config, tokenizer.first_id)
    decoder = st.open_decoder(reference.source, reference.config, st.pick_device("cpu"), torch.float32)
    hidden, found = linear_inputs.embed(decoder, text.tokens[:WINDOWS]), {}
    for index in range(min(reference.config.layers, BLOCKS)):
        for group in block_walk.walk(decoder, st.load_block(decoder, index), hidden):
            found |= dict.fromkeys(group.names, group.moment.double().numpy())
    return found


def measured(reference: Reference, opened: Opened, inputs: dict[str, Doubles]) -> Doubles:
    """dB lost, loss ratio and the zeroed linear's, of each linear, unless stored exactly: [linears, 3]."""
    rows = []
    for name, H in inputs.items():
        W, Q = (source.float32(name) for source in (reference.source, opened.source))
        N = opened.source.nearest(name, 0, W)
        if N is None or np.array_equal(N, W):
            continue
        errors = [(W - made).astype(np.float64) for made in (Q, N, np.zeros_like(W))]
        energy, (loss, least, zeroed) = (
            [np.square(e).sum() for e in errors],
            [(e @ H * e).sum() for e in errors],
        )
        rows.append((10 * np.log10(max(energy[0], 1e-30) / energy[1]), loss / least, zeroed / least))
    return np.array(rows).reshape(-1, 3)


def shown(label: str, found: Doubles) -> str:
    """A line of the table."""
    if not len(found):
        return f"{label:44} every linear is stored exactly"
    low, middle, high = found.min(0), np.median(found, 0), found.max(0)
    parts = [f"{low[i]:7.2f} {middle[i]:6.2f} {high[i]:6.2f}" for i in (0, 1)]
    return f"{label:44} {parts[0]} | {parts[1]} | {low[2]:9.2f} {middle[2]:9.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    for model in parser.parse_args().models:
        reference = open_reference(model)
        inputs = moments(reference)
        print(f"{model}\n{'output':44} dB lost: min, median, max | loss ratio: same | zeroed: min, median")
        for words in outputs():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / ("out.gguf" if words[0] == "gguf" else "out")
                command: list[Any] = [words[0], model, *words[1:], "-o", out, "--verify", "off"]
                made = CliRunner().invoke(cli, [str(word) for word in command])
                label = " ".join(map(str, words)).replace(" " + " ".join(map(str, TEXT)), " with text")
                found = measured(reference, open_output(out), inputs) if not made.exit_code else None
                print(made.output if found is None else shown(label, found), flush=True)


if __name__ == "__main__":
    main()
