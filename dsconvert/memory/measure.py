"""Peak memory measured: a process of its own loads the model, runs it once, and says what it took.

`python -m dsconvert.memory.measure REQUEST` is that process; REQUEST is JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import ConversionError, UsageError

if TYPE_CHECKING:
    from dsconvert.memory.model import Made, Sized
    from dsconvert.memory.table import Question

# ggml's numbers of the types that a cache may have.
GGML_IDS = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}


@dataclass(frozen=True)
class Measurement:
    """What is run, and by what: "llama.cpp-cpu" on a GGUF file, "transformers" or "eager" on a folder."""

    runtime: str
    path: str
    batch: int
    length: int
    cache: str | None = None
    device: str = "auto"


def measurable(
    sized: Sized, made: Made, runtime: str, batch: int, length: int, asked: Question, device: str
) -> Measurement:
    """What to run for a cell of the table; raises UsageError for what cannot be run from what is given."""
    gguf = sized.path.suffix == ".gguf"
    runs = ("llama.cpp-cpu",) if gguf else ("transformers", "eager") if made.type == "bf16" else ()
    if runtime not in runs or asked.cards > 1 or not (gguf or any(sized.path.glob("*.safetensors"))):
        raise UsageError(
            f"{made.type} in {runtime} cannot be measured here",
            where=sized.path,
            why="A GGUF file is run in llama.cpp on the CPU, a 16-bit folder with weights in torch",
            hint="Give such a file or folder, and --runtime llama.cpp-cpu, transformers or eager, or none",
        )
    return Measurement(runtime, str(sized.path), batch, length, asked.cache, device)


def measure(asked: Measurement) -> dict[str, Any]:
    """The bytes that running took: "bytes", the peak, and where it was taken from.

    Of a GPU it is what torch's allocator held, of a CPU what the process grew by from the moment before the
    model was loaded. Raises ConversionError with the last words of a process that failed.
    """
    words = [sys.executable, "-P", "-W", "ignore", "-m", "dsconvert.memory.measure"]
    done = subprocess.run([*words, json.dumps(asdict(asked))], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise ConversionError(
            f"could not be measured at batch {asked.batch}, length {asked.length}",
            where=asked.path,
            why=said[-1][:400] if said else f"The process ended with code {done.returncode}",
            hint="Ask for a smaller --batch or --seq, or leave --measure out",
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_rss() -> int:
    """The most that this process has had in memory so far, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _run(asked: Measurement) -> dict[str, Any]:
    if asked.runtime == "llama.cpp-cpu":
        from dsconvert.runtimes import llama_h, llamacpp_memory

        llama_h.open_library()
        before, kind = _peak_rss(), GGML_IDS[asked.cache or "f16"]
        buffers = llamacpp_memory.run(Path(asked.path), asked.batch, asked.length, kind)
        return {"bytes": sum(buffers.values()), "process": _peak_rss() - before, "buffers": buffers}
    from dsconvert.runtimes import torch_memory

    before, eager = _peak_rss(), asked.runtime == "eager"
    found = torch_memory.run(asked.path, asked.batch, asked.length, eager=eager, device=asked.device)
    return {"bytes": _peak_rss() - before, **found}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run(Measurement(**json.loads(sys.argv[1])))) + "\n")
