"""llama-server's OpenAI-style endpoint on files of ours, asked by OpenAI's own client.

The server is the one inside xllamacpp, the same code as the program llama-server, in a process of its own.
"""

from __future__ import annotations

import base64
import io
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import parrot
import pytest

from converters.gguf.convert import convert
from converters.gguf.output import Options

pytestmark = pytest.mark.filterwarnings("ignore")  # of other packages, all of them
SERVER = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
if len(sys.argv) > 2:
    params.mmproj.path = sys.argv[2]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 1024, 1, 0
params.cpuparams.n_threads = 1
params.warmup = params.mmproj_use_gpu = params.fit_params = False
params.use_jinja = True
server = xllamacpp.Server(params)
print("AT", server.listening_address, flush=True)
sys.stdin.read()
"""


@contextmanager
def client_of(*files: Path) -> Iterator[Any]:
    """OpenAI's client of a server with these files; the server ends with its standard input."""
    import openai

    words = [sys.executable, "-c", SERVER, *map(str, files)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(words, text=True, **pipes) as server:  # type: ignore[call-overload]
        try:
            address = next(line.split()[1] for line in server.stdout if line.startswith("AT "))
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        finally:
            server.stdin.close()
            server.wait(timeout=60)


def converted(model: str | Path, path: Path) -> Path:
    list(convert(Options(str(model), ("q8_0",), path, effort="off")))
    return path


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = parrot.parrot(tmp_path_factory.mktemp("openai") / "parrot")
    with client_of(converted(folder, folder / "parrot.gguf")) as found:
        yield found


ASKED: dict[str, Any] = {
    "model": "parrot",
    "messages": [{"role": "user", "content": "Is it?"}],
    "temperature": 0,
}


def test_an_answer_ends_at_the_token_that_only_the_configs_list_names(client: Any) -> None:
    answer = client.chat.completions.create(**ASKED)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", parrot.ANSWER)
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_streamed_answer_is_the_same(client: Any) -> None:
    chunks = list(client.chat.completions.create(**ASKED, stream=True))
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 2
    assert "".join(pieces) == parrot.ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"


def test_an_answer_is_cut_where_it_is_asked_to_be(client: Any) -> None:
    (choice,) = client.chat.completions.create(**ASKED, max_tokens=2).choices
    assert choice.finish_reason == "length"
    assert parrot.ANSWER.startswith(choice.message.content)


def test_the_model_is_listed(client: Any) -> None:
    (model,) = client.models.list().data
    assert model.object == "model"


def test_a_picture_comes_through_the_client(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install pillow")
    path = converted("sample-vl:", tmp_path / "vl.gguf")
    pixels, file = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8), io.BytesIO()
    image.fromarray(pixels).save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    with client_of(path, tmp_path / "mmproj-vl.gguf") as client:
        settings: dict[str, Any] = {"model": "vl", "max_tokens": 2, "temperature": 0}
        used = [
            client.chat.completions.create(messages=[{"role": "user", "content": asked}], **settings).usage
            for asked in ("What?", content)
        ]
    assert used[1].prompt_tokens - used[0].prompt_tokens in (576, 577)
