"""The language model inside a bigger model, as a model of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.tensor_table import check_shapes, expand, plan
from dsconvert.models.weights import Array, Floats, WeightSource


@dataclass(frozen=True)
class Inner:
    """A model inside a bigger one as a WeightSource: `names` maps its own names to the bigger model's."""

    source: WeightSource
    names: Mapping[str, str]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self.source.shapes()
        return {name: shapes[outer] for name, outer in self.names.items()}

    def dtype(self, name: str) -> str:
        return self.source.dtype(self.names[name])

    def float32(self, name: str) -> Floats:
        return self.source.float32(self.names[name])

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.source.rows(self.names[name], start, stop)

    def nearest(self, name: str, start: int, rows: Floats) -> Floats | None:
        return self.source.nearest(self.names[name], start, rows)


def language_model(
    source: WeightSource, config: ModelConfig, where: Path | None = None, *, partial: bool = False
) -> tuple[WeightSource, ModelConfig]:
    """The decoder of a checkpoint under its own architecture's names, with its config; a plain one as it is.

    A `partial` one may lack tensors. Raises CheckpointError, which names the config's file `where`, for a
    class without a table, PlanError when the tensors are not the config's.
    """
    architecture = find_architecture(config.architecture, where)
    if architecture.mount is None:
        check_shapes(architecture.table, config, source.shapes())
        return source, config
    shapes, decoder = source.shapes(), architecture.decoder
    if partial:
        check_shapes(architecture.table, config, shapes)
        specs = [s for s in expand(architecture.table, config) if set(s.names) <= shapes.keys()]
    else:
        specs = plan(architecture.table, config, shapes)
    outer = {spec.gguf: spec.names for spec in specs}
    inner = [spec for spec in expand(decoder.table, config) if spec.gguf in outer]
    names = {own: name for spec in inner for own, name in zip(spec.names, outer[spec.gguf], strict=True)}
    config = replace(config, architecture=decoder.hf_class, tied="output.weight" not in outer)
    return Inner(source, names), config
