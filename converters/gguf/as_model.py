"""A GGUF language model as a WeightSource: read back through the inverse of the architecture table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from converters.gguf.parse import GGUFFile
from converters.gguf.qtypes import QTYPES, QType
from converters.gguf.rounding import nearest
from converters.gguf.stored_config import architecture_of, stored_config
from dsconvert.models.architecture import Architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.stored_rows import by_source, source_rows, stored_rows
from dsconvert.models.tensor_table import HEADS_TURNED, Spec, fit_stored, plan_stored
from dsconvert.models.weights import Floats


@dataclass(frozen=True)
class GGUFModel:
    """A GGUF file as a WeightSource: tensors by their Hugging Face names through the inverse table."""

    file: GGUFFile
    architecture: Architecture
    config: ModelConfig
    specs: dict[str, tuple[Spec, ...]]  # the stored tensors that each is made of

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: specs[0].source for name, specs in self.specs.items()}

    def dtype(self, name: str) -> str:
        return min((self._qtype(spec) for spec in self.specs[name]), key=lambda qtype: qtype.bits).name

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return source_rows(self.specs[name], name, self._stored, start, stop)

    def float32(self, name: str) -> Floats:
        return self.rows(name, 0, self.specs[name][0].source[0])

    def _stored(self, name: str, start: int, stop: int) -> Floats:
        """Rows of a tensor of the file; of a vector values, [values, 1]."""
        tensor = self.file.tensors[name]
        return tensor.rows(start, stop) if len(tensor.shape) > 1 else tensor.rows(0, 1)[0, start:stop, None]

    def nearest(self, name: str, start: int, rows: Floats) -> Floats | None:
        """As WeightSource says; where the file has rows in several places, only whole heads are rounded."""
        specs, stop = self.specs[name], start + len(rows)
        if len(specs) == 1 and specs[0].row.transform is not HEADS_TURNED:
            return nearest(rows, self._qtype(specs[0]))
        height = specs[0].source[0] // specs[0].units
        whole = not specs[0].row.transform.units or not (start % height or stop % height)
        if not whole or any(self._qtype(spec).name not in QTYPES for spec in specs):
            return None
        named = {spec.gguf: spec for spec in specs}

        def rounded(gguf: str, first: int, end: int) -> Floats:
            stored = stored_rows(named[gguf], lambda name, a, b: rows[a - start : b - start], first, end)
            found = nearest(stored, self._qtype(named[gguf]))
            assert found is not None  # its type is written here, and its rows fill the type's blocks
            return found

        return source_rows(specs, name, rounded, start, stop)

    def _qtype(self, spec: Spec) -> QType:
        return self.file.tensors[spec.gguf].qtype


def open_model(file: GGUFFile) -> GGUFModel:
    """The weight source of a language model's file; raises CheckpointError, PlanError."""
    architecture, config = architecture_of(file), stored_config(file)
    shapes = {t.name: t.shape for t in file.tensors.values()}
    specs = plan_stored(architecture.table, config, shapes, architecture.derived(config))
    return GGUFModel(file, architecture, config, by_source(specs))


def open_parts(file: GGUFFile) -> tuple[GGUFModel, list[str]]:
    """As `open_model`, of a file that may lack tensors: what it has, and a sentence on each misfit.

    Raises CheckpointError.
    """
    architecture, config = architecture_of(file), stored_config(file)
    shapes = {t.name: t.shape for t in file.tensors.values()}
    specs, misfits = fit_stored(architecture.table, config, shapes, architecture.derived(config))
    return GGUFModel(file, architecture, config, by_source(specs)), misfits
