"""What `fuzz.py` feeds: sound files of every kind that is read, their mutations, and who opens them."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Rng = random.Random
Open = Callable[[Path, Path], object]  # the input's folder, the output's

EVIL = "\x1b]0;t\x07\x1b[2J\r\u202e\n[bold]"
ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    1.5,
    1e308,
    float("inf"),
    float("nan"),
    1 << 31,
    1 << 62,
    1 << 70,
    -(1 << 63),
    "",
    "x",
    "0",
    EVIL,
    "\ud800",
    "\ufeff",
    "../victim",
    "/etc/passwd",
    "a" * 5000,
    "{{ 7 * 7 }}",
    "{% if %}",
    [],
    {},
    [[]],
    [None],
    [0],
    ["x"],
    {"": ""},
    {"a": {"b": [1]}},
    [[[[[[[[1]]]]]]]],
)
TEMPLATES = (
    "{{ messages[0].content }}",
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% if %}",
    "{{ x.y.z }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__ }}",
    "{{ messages|tojson(indent=9) }}",
    "{{ 1/0 }}",
    "{{ '%999999999d' % 5 }}",
    "{{ 'a'|center(999999999) }}",
    "{{ [1]|batch(99999999, 0)|list }}",
    "{{ '\x1b[2J' }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ 'x' * 9999999999 }}",
    "{% generation %}a{% endgeneration %}",
    "{{ strftime_now('%Y%%') }}",
    "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}",
    "{{ messages.append(1) }}",
    "{% include 'x' %}",
    "{% import 'x' as y %}",
    "{{ messages|map('x')|list }}",
    "{{ range(9999999)|list }}",
)
CARDS = (
    "license: mit",
    "tags: [a, 2024, no]",
    "language: en",
    "base_model: [a/b, c]",
    "x: !!python/object:os.system {}",
    "x: !!bool maybe",
    "x: !!timestamp z",
    "&a [*a]",
    "a: &a [b]\nc: [*a, *a]",
    "? [x]\n: y",
    "license: [",
    "- a",
    "\t",
    "date: 9999-99-99",
    "x: 0x",
    "n: 1_0:90",
    "x: !!int ''",
    "'\x1b'",
    "{" * 300,
    "tags: " + "[" * 3000,
    "k: .inf",
)


STUMBLES = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\0",
    b"\xed\xa0\x80",
    EVIL.encode(),
    b"[" * 5000,
    b'{"a":' * 3000,
)


def write_bases(root: Path) -> None:
    """Write a sound input of every kind into `root`, each in a folder of its own."""
    import tiny  # of tests, as the other benchmarks take it

    for name, options in (("model", {}), ("bin", {"format": "bin"}), ("shards", {"shards": 2})):
        folder = tiny.tiny_checkpoint(root / name, layers=1, **options)
        _beside(folder)
    _converted(root)
    _quantized(root)
    _texts(root / "texts")


def _beside(folder: Path) -> None:
    """The small files that a model has besides: what names tokens, the template, the card."""
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    known = {key: value for key, value in config.items() if isinstance(value, str)}
    config["chat_template"] = TEMPLATES[1]
    config.setdefault("added_tokens_decoder", {})
    values = {
        "tokenizer_config": config,
        "special_tokens_map": {key: known[key] for key in ("bos_token", "eos_token") if key in known},
        "generation_config": {"eos_token_id": [1, 2], "bos_token_id": 1},
        "added_tokens": {},
    }
    for name, value in values.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")
    (folder / "README.md").write_text("---\n" + "\n".join(CARDS[:4]) + "\n---\n# A model\n", "utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATES[1], "utf-8")


def _converted(root: Path) -> None:
    """A text file with its projector, importance matrices of both formats, base log-probabilities."""
    import numpy as np
    from gguf import GGUFWriter

    from converters.gguf.convert import convert
    from converters.gguf.output import Options
    from dsconvert.proof import logprob_file

    for folder in ("gguf", "pair", "imatrix", "kld"):
        (root / folder).mkdir()
    list(
        convert(
            Options(str(root / "model"), quants=("f32",), outfile=root / "gguf" / "model.gguf", effort="off")
        )
    )
    options = Options("sample-vl:", quants=("f16",), outfile=root / "pair" / "model.gguf", effort="off")
    list(convert(options))
    projector = next(path for path in (root / "pair").iterdir() if "mmproj" in path.name)
    projector.rename(root / "pair" / "mmproj.gguf")
    rng = np.random.default_rng(0)
    entries = {f"blk.0.{name}.weight": rng.random(64, np.float32) for name in ("attn_q", "ffn_up")}
    writer = GGUFWriter(root / "imatrix" / "imatrix.gguf", "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["x.txt"])
    writer.add_uint32("imatrix.chunk_count", 4)
    for name, values in entries.items():
        writer.add_tensor(name + ".in_sum2", values)
        writer.add_tensor(name + ".counts", np.array([4], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    old = struct.pack("<i", len(entries))
    for name, values in entries.items():
        old += (
            struct.pack("<i", len(name))
            + name.encode()
            + struct.pack("<ii", 4, len(values))
            + values.tobytes()
        )
    (root / "imatrix" / "imatrix.dat").write_bytes(old)
    tokens = np.arange(32, dtype="<i4")
    rows = logprob_file.encode(rng.standard_normal((2 * (16 - 1 - 8), 512)).astype(np.float32))
    head = logprob_file.HEADER.pack(logprob_file.MAGIC, 16, 512, 2)
    (root / "kld" / "base.kld").write_bytes(head + tokens.tobytes() + rows.tobytes())


def _quantized(root: Path) -> None:
    """GPTQ and EXL2 folders, the measurement of the latter, the state of a run that has not ended."""
    import calibrated

    import converters.exl2.convert as exl2
    import converters.gptq.convert as gptq
    from dsconvert.checkpoints.checkpoint import open_checkpoint
    from dsconvert.checkpoints.safetensors_writer import from_stored
    from dsconvert.quantization.run_state import State

    small: dict[str, Any] = {"calib": "builtin", "calib_samples": 2, "calib_len": 64, "effort": "off"}
    model = str(root / "model")
    list(gptq.convert(calibrated.gptq_options(model, group_size=32, out=root / "gptq", **small)))
    for folder in ("measurement", "state"):
        (root / folder).mkdir()
    measured = root / "measurement" / "measurement.json"
    list(exl2.convert(calibrated.exl2_options(model, out=root / "exl2", measurement=measured, **small)))
    state = State(root / "state")
    pieces = {name: from_stored(tensor) for name, tensor in list(open_checkpoint(model).tensors.items())[:3]}
    state.begin({"tool": "gptq", "model": "abc", "options": {"bits": 4}})
    state.save(0, pieces, {"linears": [{"name": "a", "fell_back": None, "loss": 1.0, "rtn_loss": 2.0}]})
    state.keep("measured-00000", {"a": [["4b", 4, 0.5]]})


def _texts(folder: Path) -> None:
    folder.mkdir()
    rows = [{"text": f"Row {i} of a text, naïve 你好."} for i in range(20)]
    chats = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 9
    files = {
        "a.txt": "Some text.\n" * 50,
        "b.jsonl": "\n".join(map(json.dumps, rows)),
        "c.json": json.dumps(rows),
        "chat.jsonl": "\n".join(map(json.dumps, chats)),
    }
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))


# Mutations: bytes to bytes, from the seed alone.


def binary(rng: Rng, data: bytes) -> bytes:
    """Flip, cut, repeat and overwrite, most often in the head, where the numbers are."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 40))):
        end = len(found) if rng.random() < 0.3 else min(len(found), 4096)
        at = rng.randrange(max(end, 1))
        match rng.randrange(6):
            case 0 | 1 if found:
                found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
            case 2:
                value = rng.choice((0, 1, 2, 0x7F, 0xFF, 1 << 31, (1 << 32) - 1, 1 << 62, (1 << 64) - 1))
                width = rng.choice((1, 2, 4, 8))
                at -= at % rng.choice((1, 4))
                found[at : at + width] = (value & ((1 << 8 * width) - 1)).to_bytes(width, "little")
            case 3:
                del found[rng.randrange(len(found) + 1) :]
            case 4:
                found[at:at] = found[at : at + rng.randrange(1, 64)]
            case _:
                found[at:at] = rng.randbytes(rng.randrange(1, 16))
    return bytes(found)


def text(rng: Rng, data: bytes) -> bytes:
    """As `binary`, or something put in that parsers of text stumble over."""
    if rng.random() < 0.5:
        return binary(rng, data)
    at = rng.randrange(len(data) + 1)
    odd = rng.choice(
        (b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\xed\xa0\x80", EVIL.encode(), b"[" * 5000, b'{"a":' * 3000)
    )
    return data[:at] + odd + data[at:]


def structured(rng: Rng, data: bytes) -> bytes:
    """Change values, keys and lengths inside JSON, one or some; at times its bytes."""
    if rng.random() < 0.15:
        return text(rng, data)
    value = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            break
        holder, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice((EVIL, "", "x", str(key) + "_", "\udfff"))] = holder.pop(key)
            case 2 if isinstance(holder[key], int | float):
                holder[key] = rng.choice(
                    (-holder[key], holder[key] + 1, holder[key] * 1000, str(holder[key]))
                )
            case 3:
                holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
            case _:
                holder[key] = copy.deepcopy(rng.choice(ODD))  # it may be changed in turn
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Every (holder, key) of a JSON value; of long lists and maps some."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys)[:40]:
        yield value, key
        if depth < 8:
            yield from _places(value[key], depth + 1)


def header(rng: Rng, data: bytes) -> bytes:
    """Change a safetensors file's JSON header, or its bytes."""
    size = int.from_bytes(data[:8], "little")
    if rng.random() < 0.4:
        return binary(rng, data)
    changed = structured(rng, data[8 : 8 + size])
    return len(changed).to_bytes(8, "little") + changed + data[8 + size :]


SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # GGUF type: bytes
STRING, ARRAY = 8, 9


def keys(rng: Rng, data: bytes) -> bytes:
    """Give some of a GGUF file's keys another value or type, or leave one out; at times its bytes."""
    if rng.random() < 0.4:
        return binary(rng, data)
    count, at, parts = int.from_bytes(data[16:24], "little"), 24, []
    for _ in range(count):
        begin = at
        at += 8 + int.from_bytes(data[at : at + 8], "little")
        value = at
        at = _after(data, at + 4, int.from_bytes(data[at : at + 4], "little"))
        parts.append((data[begin:value], data[value:at]))
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = rng.randrange(len(parts))
        if rng.random() < 0.1:
            del parts[place]
        elif rng.random() < 0.1:
            parts[place] = (parts[place][0], rng.choice(parts)[1])
        else:
            parts[place] = (parts[place][0], _value(rng))
    end = _tensors(data, at)
    head = data[:16] + len(parts).to_bytes(8, "little") + b"".join(key + value for key, value in parts)
    head += data[at:end]
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data[-(-end // 32) * 32 :]


def _after(data: bytes, at: int, kind: int) -> int:
    """Where a value of this type ends that begins at `at`."""
    if kind == STRING:
        return at + 8 + int.from_bytes(data[at : at + 8], "little")
    if kind != ARRAY:
        return at + SCALARS[kind]
    item, count = struct.unpack_from("<IQ", data, at)
    at += 12
    if item in SCALARS:
        return at + count * SCALARS[item]
    for _ in range(count):
        at = _after(data, at, item)
    return at


def _tensors(data: bytes, at: int) -> int:
    """Where the tensors' descriptions end that begin at `at`."""
    for _ in range(int.from_bytes(data[8:16], "little")):
        at += 8 + int.from_bytes(data[at : at + 8], "little")
        at += 4 + 8 * int.from_bytes(data[at : at + 4], "little") + 12
    return at


def _value(rng: Rng) -> bytes:
    """A type and a value of it."""
    kind = rng.choice((*SCALARS, STRING, ARRAY))
    if kind == STRING:
        raw = rng.choice(("", "x", "gpt2", "llama", EVIL, "{{ 1/0 }}", "a" * 5000)).encode()
        return struct.pack("<IQ", kind, len(raw)) + raw
    if kind == ARRAY:
        item, count = rng.choice(tuple(SCALARS)), rng.choice((0, 1, 3, 600))
        return struct.pack("<IIQ", kind, item, count) + _bits(rng, item) * count
    return struct.pack("<I", kind) + _bits(rng, kind)


def _bits(rng: Rng, kind: int) -> bytes:
    """A number's bytes: small, at an end of its range, not finite."""
    if kind in (6, 12):
        number = rng.choice((0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, float("inf"), float("-inf"), float("nan")))
        return struct.pack("<f" if kind == 6 else "<d", number)
    low, rest = (
        rng.choice((b"\0", b"\1", b"\2", b"\x40", b"\xff", b"\x7f")),
        rng.choice((b"\0", b"\0", b"\xff")),
    )
    return low + rest * (SCALARS[kind] - 1)


def template(rng: Rng, data: bytes) -> bytes:
    """Pieces of templates, sound and not, or the bytes of one changed."""
    if rng.random() < 0.2:
        return text(rng, data)
    return "".join(rng.choice(TEMPLATES) for _ in range(rng.choice((1, 1, 2, 9)))).encode()


def card(rng: Rng, data: bytes) -> bytes:
    """A front matter of odd YAML, or the bytes of one changed."""
    if rng.random() < 0.3:
        return text(rng, data)
    lines = [rng.choice(CARDS) for _ in range(rng.randrange(1, 5))]
    return ("---\n" + "\n".join(lines) + rng.choice(("\n---\n", "\n", "\n---"))).encode(
        "utf-8", "surrogatepass"
    )


def packed(rng: Rng, data: bytes) -> bytes:
    """A gzipped text: its bytes changed, before or after packing; at times a bomb."""
    if rng.random() < 0.05:
        return gzip.compress(b"a" * (80 << 20), 1)
    if rng.random() < 0.5:
        return binary(rng, data)
    return gzip.compress(text(rng, gzip.decompress(data)), 1)


def special(rng: Rng, path: Path) -> None:
    """Put something under the name of a file that is none, or none to read."""
    path.unlink()
    match rng.randrange(6):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to("nothing")
        case 4:
            path.symlink_to(path.name)
        case _:
            path.touch()


# Who opens it: what the commands do with the files, in this process.


def convert_f32(folder: Path, out: Path) -> object:
    from converters.gguf.convert import convert
    from converters.gguf.output import Options

    return list(
        convert(Options(str(folder), quants=("f32",), outfile=out / "x.gguf", effort="off", threads=1))
    )


def read_output(folder: Path, out: Path) -> object:
    """As verify opens it: every weight is decoded."""
    from converters.outputs import open_output

    path = folder / "model.gguf" if (folder / "model.gguf").exists() else folder
    opened = open_output(path)
    return [opened.source.float32(name).sum() for name in list(opened.source.shapes())[:40]]


def inspect(folder: Path, out: Path) -> object:
    from converters.gguf import inspect
    from converters.gguf.parse import open_gguf
    from dsconvert.streams import as_json
    from tokenizer_tools.show import open_metadata

    file = open_gguf(folder / "model.gguf")
    found = [as_json(inspect.summary(file)), *inspect.judge([file])]
    return [found, open_metadata(file.path, file.keys)]


def projector(folder: Path, out: Path) -> object:
    from converters.gguf import inspect
    from converters.gguf.parse import open_gguf
    from converters.gguf.projector import keys as projector_keys

    file = open_gguf(folder / "mmproj.gguf")
    found = list(inspect.judge([open_gguf(folder / "model.gguf"), file]))
    projector_keys.open_projector(file)
    return [found, [tensor.rows(0, 1).sum() for tensor in list(file.tensors.values())[:4]]]


def matrix(folder: Path, out: Path) -> object:
    from converters.gguf import importance

    shapes = {f"blk.0.{name}.weight": (64, 64) for name in ("attn_q", "attn_k", "ffn_up")}
    return [importance.select(importance.read(path), shapes, shapes) for path in sorted(folder.iterdir())]


def base_file(folder: Path, out: Path) -> object:
    from dsconvert.proof.logprob_file import open_base
    from dsconvert.report.charts import log_histogram

    base = open_base(folder / "base.kld")
    values = base.log_probs(0).astype("float64").reshape(-1)
    return log_histogram(values, "x", {"mean": float(values.mean())})


def state(folder: Path, out: Path) -> object:
    from converters.exl2.measure import parsed
    from dsconvert.quantization.blocks import collected
    from dsconvert.quantization.costs import kept_blocks
    from dsconvert.quantization.run_state import State

    found = State(folder)
    return [found.identity(), collected(found), kept_blocks(found, 1, parsed)]


def measurement(folder: Path, out: Path) -> object:
    from converters.exl2 import measure

    path = folder / "measurement.json"
    return measure.load(path, {"a": (1, 1)})


def texts(folder: Path, out: Path) -> object:
    from dsconvert.texts import files as text_files

    path = next(folder.iterdir())
    reader = text_files.read_chats if path.name.startswith("chat") else text_files.read_documents
    return text_files.pack(str(row) for row in reader(path))


@dataclass(frozen=True)
class Kind:
    """A kind of input: its sound folder, the files of which one is changed, how, who opens it, as a command.

    `alone` says that only the changed file stays.
    """

    base: str
    files: tuple[str, ...]
    mutate: Callable[[Rng, bytes], bytes]
    open: Open
    command: tuple[str, ...]
    alone: bool = False


GGUF = ("gguf", "{input}", "-o", "{output}/x.gguf", "--quant", "f32", "--effort", "off")
VERIFY = ("verify", "{input}/model.gguf", "--against", "{bases}/model", "--windows", "1", "--length", "32")
FOLDER = ("verify", "{input}", "--against", "{bases}/model", "--windows", "1", "--length", "32")
MATRIX = ("gguf", "{bases}/model", "-o", "{output}/x.gguf", "--quant", "q4_k_m", "--dry-run", "--imatrix")
SMALL = ("--effort", "off", "--calib-samples", "1", "--calib-len", "16", "--group-size", "32")
CALIB = ("gptq", "{bases}/model", "-o", "{output}/x", *SMALL, "--calib", "{input}")
INSPECT = ("inspect", "{input}/model.gguf")
LOGITS = ("verify", "{bases}/gguf/model.gguf", "--against", "{bases}/model", "--kld-base", "{input}/base.kld")
SPECIALS = ("special_tokens_map.json", "generation_config.json", "added_tokens.json", "tokenizer_config.json")
RECORDS = ("job.json", "block-00000.json", "measured-00000.json")
FEW = ("--calib", "builtin", "--calib-samples", "1", "--calib-len", "16", "--effort", "off")
MEASURED = ("exl2", "{bases}/model", "-o", "{output}/x", *FEW, "--measurement", "{input}/measurement.json")
TEXTS = ("a.txt", "b.jsonl", "c.json", "chat.jsonl")
QUANTIZED = ("config.json", "quantize_config.json")
KINDS: dict[str, Kind] = {
    "config": Kind("model", ("config.json",), structured, convert_f32, GGUF),
    "index": Kind("shards", ("model.safetensors.index.json",), structured, convert_f32, GGUF),
    "safetensors": Kind("model", ("model.safetensors",), header, convert_f32, GGUF),
    "bin": Kind("bin", ("pytorch_model.bin",), binary, convert_f32, GGUF),
    "tokenizer": Kind("model", ("tokenizer.json",), structured, convert_f32, GGUF),
    "special": Kind("model", SPECIALS, structured, convert_f32, GGUF),
    "template": Kind("model", ("chat_template.jinja",), template, convert_f32, GGUF),
    "card": Kind("model", ("README.md",), card, convert_f32, GGUF),
    "gguf inspect": Kind("gguf", ("model.gguf",), keys, inspect, (*INSPECT, "--tensors")),
    "gguf verify": Kind("gguf", ("model.gguf",), keys, read_output, VERIFY),
    "gguf tokenizer": Kind("gguf", ("model.gguf",), keys, inspect, ("tokenizer", "{input}/model.gguf")),
    "mmproj": Kind("pair", ("mmproj.gguf",), keys, projector, (*INSPECT, "{input}/mmproj.gguf")),
    "imatrix": Kind(
        "imatrix", ("imatrix.gguf",), keys, matrix, (*MATRIX, "{input}/imatrix.gguf"), alone=True
    ),
    "imatrix.dat": Kind(
        "imatrix", ("imatrix.dat",), binary, matrix, (*MATRIX, "{input}/imatrix.dat"), alone=True
    ),
    "kld-base": Kind(
        "kld",
        ("base.kld",),
        binary,
        base_file,
        LOGITS,
    ),
    "gptq": Kind("gptq", QUANTIZED, structured, read_output, FOLDER),
    "gptq weights": Kind("gptq", ("model.safetensors",), header, read_output, FOLDER),
    "exl2": Kind("exl2", QUANTIZED[:1], structured, read_output, FOLDER),
    "exl2 weights": Kind("exl2", ("output.safetensors",), header, read_output, FOLDER),
    "state": Kind(
        "state",
        ("job.json", "block-00000.json", "measured-00000.json"),
        structured,
        state,
        ("inspect", "{input}/job.json"),
    ),
    "measurement": Kind(
        "measurement", ("measurement.json",), structured, measurement, ("inspect", "{input}/measurement.json")
    ),
    "texts": Kind("texts", TEXTS, text, texts, CALIB, alone=True),
    "packed texts": Kind("texts", tuple(f"{name}.gz" for name in TEXTS), packed, texts, CALIB, alone=True),
}
