"""The chat template for pictures: equal to the model's own prompt on plain dialogues, usable by servers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_vl
from tiny_vl import IMAGE, VL

from converters.gguf.convert import convert
from converters.gguf.output import Options
from converters.gguf.parse import open_gguf
from tokenizer_tools.chat_template import render
from tokenizer_tools.rendering import Unrendered
from tokenizer_tools.vision_template import SYSTEM, vision_template

EOS = tiny_vl.tiny.EOS
TEMPLATE = vision_template(IMAGE)
DATA = Path(__file__).parents[3] / "shared" / "data" / "tokenizers" / "deepseek-vl"


def own_prompt(messages: list[tuple[str, str]], system: str = SYSTEM) -> str:
    """The format "deepseek" of the original code: separators alternate, an empty answer asks for one."""
    text = system + "\n\n"
    for number, (role, content) in enumerate(messages):
        text += f"{role}: {content.strip()}" + ("\n\n", EOS)[number % 2] if content else f"{role}:"
    return text.strip()


def asked(messages: list[tuple[str, str]], parts: bool) -> list[dict[str, Any]]:
    """The same dialogue as a server has it, without the empty answer at the end."""
    return [
        {
            "role": role.lower(),
            "content": [{"type": "text", "text": content}] if parts else content,
        }
        for role, content in messages
        if content
    ]


DIALOGUES = {
    "a question": [("User", "Hello, who are you?"), ("Assistant", "")],
    "three turns": [("User", "Hi"), ("Assistant", "Hello there."), ("User", "Who?"), ("Assistant", "")],
    "space around": [("User", "  Hi \n"), ("Assistant", " Hello. "), ("User", "\tBye"), ("Assistant", "")],
    "lines and marks": [("User", "a\n\nb: c\\n 'd' \"e\" {{ f }} {% g %}"), ("Assistant", "")],
    "other scripts": [("User", "\u4f60\u597d\uff0c\u4e16\u754c \U0001f600 \xe9"), ("Assistant", "")],
    "an answer at the end": [("User", "Hi"), ("Assistant", "Hello.")],
}


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("parts", [False, True], ids=["strings", "parts"])
def test_plain_dialogues_are_the_models_own(name: str, parts: bool) -> None:
    dialogue = DIALOGUES[name]
    wants_answer = dialogue[-1] == ("Assistant", "")
    found = render(TEMPLATE, asked(dialogue, parts), eos_token=EOS, add_generation_prompt=wants_answer)
    assert found == own_prompt(dialogue)


def test_system_text_can_be_replaced() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert render(TEMPLATE, messages, eos_token=EOS) == "Be brief.\n\nUser: Hi\n\nAssistant:"
    messages[0]["content"] = ""
    assert render(TEMPLATE, messages, eos_token=EOS) == "User: Hi\n\nAssistant:"


PARTS: dict[str, list[dict[str, Any]]] = {
    "image": [{"type": "image"}, {"type": "text", "text": "What is this?"}],
    "image_url": [
        {"type": "image_url", "image_url": {"url": "data:x"}},
        {"type": "text", "text": "What is this?"},
    ],
    "media_marker": [{"type": "media_marker", "text": IMAGE}, {"type": "text", "text": "What is this?"}],
    "string": [{"type": "text", "text": f"{IMAGE}What is this?"}],
}


@pytest.mark.parametrize("name", PARTS)
def test_pictures(name: str) -> None:
    """The original's prompt for {"content": "<image_placeholder>What is this?"}."""
    wanted = own_prompt([("User", f"{IMAGE}What is this?"), ("Assistant", "")])
    assert render(TEMPLATE, [{"role": "user", "content": PARTS[name]}], eos_token=EOS) == wanted


def test_a_picture_as_a_string_and_between_texts() -> None:
    content = f"{IMAGE}What is this?"
    wanted = own_prompt([("User", content), ("Assistant", "")])
    assert render(TEMPLATE, [{"role": "user", "content": content}], eos_token=EOS) == wanted
    texts = [{"type": "text", "text": " Compare "}, {"type": "image"}, {"type": "text", "text": " with"}]
    texts += [{"type": "text", "text": "this: "}, {"type": "image"}]
    found = render(TEMPLATE, [{"role": "user", "content": texts}], eos_token=EOS)
    assert f"User: Compare {IMAGE} with this: {IMAGE}\n\nAssistant:" in found


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": "user", "content": [{"type": "audio"}]}]
)
def test_what_the_model_cannot_take_is_an_error(message: dict[str, Any]) -> None:
    with pytest.raises(Unrendered, match=r"tool|audio"):
        render(TEMPLATE, [{"role": "user", "content": "a"}, message], eos_token=EOS)


def test_llamacpp_knows_the_format_without_jinja() -> None:
    assert "'Assistant: ' + message['content'] + eos_token" in TEMPLATE


def test_ids_with_the_published_tokenizer() -> None:
    """The prompt's pieces keep their ids: special tokens are single, the end has no trailing space."""
    if not DATA.is_dir():
        pytest.skip("needs DeepSeek-VL's tokenizer.json (model licence) in ../shared/data/tokenizers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DATA / "tokenizer.json"))
    messages = [{"role": "user", "content": PARTS["image"]}, {"role": "assistant", "content": "A cat."}]
    text = render(TEMPLATE, [*messages, {"role": "user", "content": "Why?"}], eos_token=EOS)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids.count(100015) == 1
    assert ids.count(100001) == 1
    assert tokenizer.decode(ids[-2:]) == "Assistant:"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("template")
    model = tiny_vl.vl_checkpoint(root / "m", VL())
    tiny_vl.tiny.write_json(model / "chat_template.json", {"chat_template": LIST_ONLY})
    list(convert(Options(str(model), ("f16",), root / "x.gguf", effort="off")))
    return root / "x.gguf", root / "mmproj-x.gguf"


LIST_ONLY = (
    "{% for message in messages %}{{ message['role'] }}: {% for c in message['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def test_the_file_carries_it_and_keeps_the_models_own_by_name(written: tuple[Path, Path]) -> None:
    keys = open_gguf(written[0]).keys
    assert keys["tokenizer.chat_template"] == TEMPLATE
    assert keys["tokenizer.chat_template.model"] == LIST_ONLY
    assert keys["tokenizer.chat_templates"] == ["model"]


# llama.cpp's server, in a process of its own: it logs, and it can abort.
SERVER = '''
import base64, json, struct, sys, urllib.request, zlib
import xllamacpp

def png(side):
    rows = b"".join(b"\\0" + bytes([128, 64, 200]) * side for _ in range(side))
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\\x89PNG\\r\\n\\x1a\\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")

params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path = sys.argv[1:3]
params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
params.warmup = params.mmproj_use_gpu = params.fit_params = False
params.use_jinja = True
server = xllamacpp.Server(params)

def post(path, body):
    data, head = json.dumps(body).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, data, head)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())

url = "data:image/png;base64," + base64.b64encode(png(64)).decode()
picture = {"type": "image_url", "image_url": {"url": url}}
question = {"type": "text", "text": "What is this?"}
found = []
for content in ("What is this?", [question], [picture, question]):
    turns = [("user", "Hi"), ("assistant", " Hello."), ("user", content)]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = post("/v1/chat/completions", {"messages": messages, "max_tokens": 1, "temperature": 0})
    prompt = post("/apply-template", {"messages": messages})["prompt"]
    found.append([prompt, answer["usage"]["prompt_tokens"]])
print("FOUND" + json.dumps(found))
'''  # fmt: skip


def test_llama_server_renders_it_and_takes_pictures(written: tuple[Path, Path]) -> None:
    from tokenizers import Tokenizer

    done = subprocess.run(
        [sys.executable, "-c", SERVER, *map(str, written)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    string, part, picture = json.loads(line.removeprefix("FOUND"))
    dialogue = [("User", "Hi"), ("Assistant", "Hello."), ("User", "What is this?"), ("Assistant", "")]
    assert string[0] == part[0] == own_prompt(dialogue)
    tokenizer = Tokenizer.from_str(open_gguf(written[0]).keys["tokenizer.huggingface.json"])
    ids = tokenizer.encode(string[0], add_special_tokens=False).ids
    assert string[1] == part[1] == len(ids) + 1  # BOS
    assert re.fullmatch(re.escape(string[0]).replace("What", "<__media[^>]*>What"), picture[0])
    assert picture[1] == string[1] + VL().tokens
