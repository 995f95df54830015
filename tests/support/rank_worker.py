"""One of several processes in tests/quantization/test_ranks.py: measures moments, or runs the command and
dies on the way.

rank_worker.py moments OUT.npz
rank_worker.py aborts WORDS...             `dsconvert WORDS...`; aborts while Python shuts down
rank_worker.py dies RANK BLOCK WORDS...    `dsconvert WORDS...`; ends where BLOCK is about to be saved
"""

from __future__ import annotations

import atexit
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import random_llama
import torch

from dsconvert.cli import cli
from dsconvert.decoder import block_walk, linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.quantization import blocks
from dsconvert.quantization.ranks import ALONE, Ranks, joined, leave


def moments(ranks: Ranks = ALONE) -> dict[str, Any]:
    """The Hessians of every group of a random model, by its first linear, from this group's windows."""
    _, source, config = random_llama.make()
    decoder = st.open_decoder(source, config, torch.device("cpu"), torch.float32)
    windows = random_llama.tokens(config, 5, 24)  # an odd number: the shares differ
    hidden, found = linear_inputs.embed(decoder, windows[ranks.share(len(windows))]), {}
    for index in range(config.layers):
        block = st.load_block(decoder, index)
        for group in blocks.measured(block_walk.walk(decoder, block, hidden), ranks):
            found[group.names[0]] = group.moment.clone().numpy()
    return found


def dies(rank: int, block: int) -> None:
    """Let the process of this number end without a word in the block, as after kill -9.

    The others abort while Python shuts down, as torch's threads make them do now and then.
    """
    load, alone = st.load_block, os.environ["RANK"] != str(rank)

    def ending(decoder: Any, index: int) -> Any:
        if index == block and not alone:
            os._exit(9)
        return load(decoder, index)

    st.load_block = ending
    if alone:
        atexit.register(os.abort)


if __name__ == "__main__":
    if sys.argv[1] == "moments":
        with joined() as group:
            result = moments(group)
            if group.first:
                np.savez(Path(sys.argv[2]), **result)
        leave(0)
    elif sys.argv[1] == "aborts":
        atexit.register(os.abort)
        cli(sys.argv[2:])
    else:
        dies(int(sys.argv[2]), int(sys.argv[3]))
        cli(sys.argv[4:])
