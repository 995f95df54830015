"""Outputs of every format, read whole to be harmed by their Hugging Face names and written again.

A `Blocks` is a GGUF file, a `Folder` a GPTQ, EXL2 or 16-bit folder. Both have the same verbs: what is planted
(`tests/support/planted.py`) is said once for all formats. Nothing here uses the readers or the packers of the
code under test, but for GGUF's layout.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tiny import NUMPY, with_header

from converters.gguf.layout import Tensor, lay_out
from converters.gguf.parse import open_gguf
from converters.gguf.qtypes import QTYPES, QType

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
DTYPES = NUMPY | {"I32": "<i4", "I16": "<i2"}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where a block keeps the float16 numbers that all its values are multiples of.
SCALES: dict[str, tuple[int, ...]] = {
    "q8_0": (0,),
    "q6_k": (208,),
    "q5_k": (0, 2),
    "q5_0": (0,),
    "q5_1": (0, 2),
    "q4_k": (0, 2),
    "q4_0": (0,),
    "q4_1": (0, 2),
    "q3_k": (108,),
    "q2_k": (80, 82),
    "iq4_nl": (0,),
    "iq4_xs": (0,),
    "iq3_s": (0,),
    "iq3_xxs": (0,),
    "iq2_s": (0,),
    "iq2_xs": (0,),
    "iq2_xxs": (0,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
# Types whose blocks are of the same size, so that one can be claimed for the other.
TWINS = {"q4_0": "iq4_nl", "q3_k": "iq3_s", "f16": "bf16", "tq2_0": "iq2_xxs"}
TWINS |= {other: kind for kind, other in TWINS.items()}
FLOATS = {"f32": "<f4", "f16": "<f2"}
PLAIN_BLOCK = 32  # values that count as a block of types that have none
LAYER = re.compile(r"(blk\.|model\.layers\.)(\d+)\.")


def gguf_name(name: str) -> str:
    """The GGUF name of a module of Llama's layout."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return f"blk.{layer[1]}.{GGUF_NAMES[name[layer.end() :]]}" if layer else GGUF_NAMES[name]


def renumbered(name: str, removed: int) -> str:
    """The name of a tensor when the block `removed` is gone; "" for a tensor of that block."""
    found = LAYER.match(name)
    if not found or int(found[2]) < removed:
        return name
    return "" if int(found[2]) == removed else f"{found[1]}{int(found[2]) - 1}.{name[found.end() :]}"


@dataclass
class Blocks:
    """A GGUF file: typed keys, and of each tensor its shape, its type and its rows of bytes."""

    path: Path
    keys: dict[str, tuple[str, Any]]
    tensors: dict[str, tuple[tuple[int, ...], QType, Bytes]]

    def write(self, target: Path) -> Path:
        tensors = [Tensor(name, shape, qtype) for name, (shape, qtype, _) in self.tensors.items()]
        target.parent.mkdir(exist_ok=True)
        layout = lay_out(target.name, self.keys, tensors)
        data = bytearray(layout.nbytes)
        data[: len(layout.head)] = layout.head
        for tensor in tensors:
            at = layout.offsets[tensor.name]
            data[at : at + tensor.nbytes] = self.tensors[tensor.name][2].tobytes()
        target.write_bytes(data)
        return target

    def set(self, key: str, value: Any) -> None:
        """A number of the model, by its name in config.json."""
        name = {
            "rope_theta": "rope.freq_base",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "num_hidden_layers": "block_count",
            "max_position_embeddings": "context_length",
        }[key]
        full = f"{self.keys['general.architecture'][1]}.{name}"
        self.keys[full] = (self.keys[full][0], value)

    @property
    def layers(self) -> int:
        return int(self.keys[f"{self.keys['general.architecture'][1]}.block_count"][1])

    def rows(self, name: str) -> Bytes:
        """The stored rows of a module's weight, to be changed in place."""
        return self.tensors[f"{gguf_name(name)}.weight"][2]

    def kind(self, name: str) -> str:
        return self.tensors[f"{gguf_name(name)}.weight"][1].name

    def zero(self, name: str) -> None:
        self.rows(name)[:] = 0

    def zero_row(self, name: str, row: int) -> None:
        self.rows(name)[row] = 0

    def permute(self, name: str, order: Sequence[int] | Array) -> None:
        """Row i becomes what row order[i] was."""
        rows = self.rows(name)
        rows[:] = rows[np.asarray(order)]

    def exchange(self, one: str, other: str) -> None:
        """Each of two modules gets the other's weight, its type with it."""
        a, b = (f"{gguf_name(name)}.weight" for name in (one, other))
        self.tensors[a], self.tensors[b] = self.tensors[b], self.tensors[a]

    def scale_row(self, name: str, row: int, factor: float) -> None:
        kind = self.tensors[f"{gguf_name(name)}.weight"][1]
        self._scale(self.rows(name)[row].reshape(-1, kind.size), kind.name, factor)

    def scale_block(self, name: str, row: int, factor: float) -> None:
        """The second block of a row."""
        kind = self.tensors[f"{gguf_name(name)}.weight"][1]
        blocks = self.rows(name)[row].reshape(-1, kind.size)
        part = slice(1, 2) if kind.block > 1 else slice(PLAIN_BLOCK, 2 * PLAIN_BLOCK)
        self._scale(blocks[part], kind.name, factor)

    @staticmethod
    def _scale(blocks: Bytes, kind: str, factor: float) -> None:
        if kind in FLOATS:
            values = blocks.view(FLOATS[kind])
            values[:] = values * np.float32(factor)
        elif kind == "bf16":
            wide = (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
            blocks.view("<u2")[:] = (wide.view(np.uint32) + 0x8000) >> 16
        elif kind == "mxfp4":
            blocks[:, 0] += round(np.log2(factor))
        else:
            for at in SCALES[kind]:
                field = np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2") * np.float32(factor)
                blocks[:, at : at + 2] = field.astype("<f2").view(np.uint8)

    def remove_block(self, index: int) -> None:
        new = {renumbered(name, index): tensor for name, tensor in self.tensors.items()}
        new.pop("")
        self.tensors = new
        self.set("num_hidden_layers", self.layers - 1)

    def add(self, name: str, values: Array) -> None:
        self.tensors[name] = (values.shape, QTYPES["f32"], values.astype("<f4").reshape(1, -1).view(np.uint8))

    def claim(self, name: str) -> bool:
        """Another type of the same size for a tensor; False where there is none."""
        full = f"{gguf_name(name)}.weight"
        shape, kind, rows = self.tensors[full]
        if kind.name not in TWINS:
            return False
        self.tensors[full] = (shape, QTYPES[TWINS[kind.name]], rows)
        return True


@dataclass
class Folder:
    """A model folder with one weight file: config.json, and the arrays by name (bf16 as uint16)."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Array]
    types: dict[str, str]

    def write(self, target: Path) -> Path:
        weights = next(self.path.glob("*.safetensors")).name
        shutil.copytree(self.path, target, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        (target / "config.json").write_text(json.dumps(self.config), "utf-8")
        header: dict[str, Any] = {}
        begin = 0
        for name, array in self.tensors.items():
            end = begin + array.nbytes
            header[name] = {"dtype": self.types[name], "shape": array.shape, "data_offsets": [begin, end]}
            begin = end
        data = b"".join(array.tobytes() for array in self.tensors.values())
        (target / weights).write_bytes(with_header(header, data))
        return target

    @property
    def packed(self) -> str:
        """ "q_weight" of EXL2, "qweight" of GPTQ."""
        return "q_weight" if any(name.endswith(".q_weight") for name in self.tensors) else "qweight"

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])

    def set(self, key: str, value: Any) -> None:
        self.config[key] = value
        rope = self.config.get("rope_parameters")
        if key == "rope_theta" and isinstance(rope, dict):
            rope[key] = value

    def zero(self, name: str) -> None:
        for part in ("weight", "scales", "q_scale_max"):
            if f"{name}.{part}" in self.tensors:
                self.tensors[f"{name}.{part}"][:] = 0

    def zero_row(self, name: str, row: int) -> None:
        """A row of scale 0 where each has its own; of EXL2, of codes that stand for 0."""
        for part, where in (("weight", (row,)), ("scales", (slice(None), row))):
            if f"{name}.{part}" in self.tensors:
                self.tensors[f"{name}.{part}"][where] = 0
        if f"{name}.q_weight" in self.tensors:
            words = self.tensors[f"{name}.q_weight"]
            table = self.tensors[f"{name}.q_groups"].reshape(-1, 2).tolist()
            for (bits, first), (_, last) in zip(table, [*table[1:], (0, len(words))], strict=True):
                middle = packed(np.full((32, 1), 1 << (bits - 1), np.uint8), bits)[0]
                words[first:last, row] = np.resize(middle, last - first)

    def permute(self, name: str, order: Sequence[int] | Array) -> None:
        self._rows(name, lambda part, rows: rows.__setitem__(slice(None), rows[np.asarray(order)]))

    def exchange(self, one: str, other: str) -> None:
        parts = [name.removeprefix(one) for name in self.tensors if name.startswith(f"{one}.")]
        for part in parts:
            a, b = one + part, other + part
            self.tensors[a], self.tensors[b] = self.tensors[b], self.tensors[a]

    def scale_row(self, name: str, row: int, factor: float) -> None:
        """GPTQ by the factor, EXL2 by the nearest that its scale codes have."""

        def scale(part: str, rows: Array) -> None:
            if part in ("scales", "weight"):
                rows[row] = self._times(rows[row], name, factor)
            elif part == "q_scale":
                rows[row] = _scale_code(rows[row], factor)

        self._rows(name, scale)

    def scale_block(self, name: str, row: int, factor: float) -> None:
        """The second group of a row."""

        def scale(part: str, rows: Array) -> None:
            if part == "weight":
                block = slice(PLAIN_BLOCK, 2 * PLAIN_BLOCK)
                rows[row, block] = self._times(rows[row, block], name, factor)
            elif part in ("scales", "q_scale"):
                group = min(1, rows.shape[1] - 1)
                old = rows[row, group]
                rows[row, group] = old * factor if part == "scales" else _scale_code(old, factor)

        self._rows(name, scale)

    def _times(self, values: Array, name: str, factor: float) -> Array:
        if self.types.get(f"{name}.weight") != "BF16":
            return values * np.asarray(factor, values.dtype)
        wide = (values.astype(np.uint32) << 16).view(np.float32) * np.float32(factor)
        return ((wide.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)

    def _bits(self, name: str) -> int:
        weight, order = self.tensors.get(f"{name}.qweight"), self.tensors.get(f"{name}.g_idx")
        return len(weight) * 32 // len(order) if weight is not None and order is not None else 0

    def _rows(self, name: str, change: Callable[[str, Array], None]) -> None:
        """`change` every part of a linear, its outputs first: words stay whole, small fields one by one."""
        for part in ("weight", "qweight", "scales", "qzeros", "q_weight", "q_scale"):
            if f"{name}.{part}" not in self.tensors:
                continue
            stored = self.tensors[f"{name}.{part}"]
            if part == "weight":
                change(part, stored)
            elif part in ("qzeros", "q_scale"):
                bits = 4 if part == "q_scale" else self._bits(name)
                fields = unpacked(stored, bits)
                change(part, fields)
                self.tensors[f"{name}.{part}"] = packed(fields, bits)
            else:
                rows = np.ascontiguousarray(stored.T)
                change(part, rows)
                self.tensors[f"{name}.{part}"] = np.ascontiguousarray(rows.T)

    def remove_block(self, index: int) -> None:
        for table in (self.tensors, self.types):
            new: dict[str, Any] = {renumbered(name, index): value for name, value in table.items()}  # type: ignore[attr-defined]
            new.pop("")
            table.clear()
            table.update(new)
        self.set("num_hidden_layers", self.layers - 1)


Output = Blocks | Folder


def _scale_code(codes: Array, factor: float) -> Array:
    """EXL2's step is the square of code + 1: the nearest codes, another in any case; all of them down where
    one has no room above.
    """
    roots = np.asarray(codes, np.float64) + 1
    up = np.maximum(np.rint(roots * factor**0.5), roots + 1)
    down = np.minimum(np.rint(roots / factor**0.5), roots - 1)
    return np.asarray((up if up.max() <= 16 else np.maximum(down, 1)) - 1, np.uint8)


def unpacked(words: Array, bits: int) -> Array:
    """The fields of `bits` bits of int32 [G, words]: uint8 [fields, G]."""
    octets = np.ascontiguousarray(words, "<i4").view(np.uint8)
    stream = np.unpackbits(octets, axis=1, bitorder="little").reshape(len(words), -1, bits)
    weights = (1 << np.arange(bits)).astype(np.uint8)
    return np.ascontiguousarray((stream * weights).sum(2).astype(np.uint8).T)


def packed(fields: Array, bits: int) -> Array:
    """The inverse of `unpacked`."""
    stream = (fields.T[:, :, None] >> np.arange(bits).astype(np.uint8)) & 1
    octets = np.packbits(stream.reshape(fields.shape[1], -1).astype(np.uint8), axis=1, bitorder="little")
    return np.ascontiguousarray(octets).view("<i4")


def read(path: Path) -> Output:
    """The output at `path`, all of it."""
    if path.is_file():
        file = open_gguf(path)
        tensors = {t.name: (t.shape, t.qtype, t.blocks().copy()) for t in file.tensors.values()}
        return Blocks(path, dict(file.typed), tensors)
    weights = next(path.glob("*.safetensors"))
    data = weights.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    arrays = {}
    for name, entry in header.items():
        start, stop = (8 + size + at for at in entry["data_offsets"])
        arrays[name] = np.frombuffer(data[start:stop], DTYPES[entry["dtype"]]).reshape(entry["shape"]).copy()
    config = json.loads((path / "config.json").read_text("utf-8"))
    return Folder(path, config, arrays, {name: entry["dtype"] for name, entry in header.items()})
