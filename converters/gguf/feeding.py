"""A GGUF conversion as the job of a calibrated run: which linears it has, and what is made of each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from converters.gguf.feedback import solvable
from converters.gguf.plan import Job
from converters.gguf.qtypes import QType
from dsconvert.calibration.request import CalibrationRequest
from dsconvert.decoder import torch_decoder as st
from dsconvert.models.architectures import find_architecture
from dsconvert.models.config import ModelConfig
from dsconvert.models.language_model import language_model
from dsconvert.models.stored_rows import by_source
from dsconvert.models.tensor_table import Spec, plan
from dsconvert.models.weights import WeightSource
from dsconvert.quantization.known_inputs import DAMP
from dsconvert.quantization.linears import LINEARS, Linear, Selection
from dsconvert.quantization.plan import RunOptions
from tokenizer_tools.load import TokenizerData

ROUNDS = {"q2_k": 1, "q3_k": 1}  # of refinement, where none are asked for: it is worth its time at few bits


@dataclass(frozen=True)
class Feeding:
    """A GGUF conversion as the job of a calibrated run: its linears are those of the language model."""

    job: Job

    @cached_property
    def run(self) -> RunOptions:
        """What was asked for, as other calibrated conversions are asked."""
        asked = self.job.options
        text = asked.calibration or CalibrationRequest()
        return RunOptions(
            asked.model, text, asked.add_bos, self.out, asked.resume, asked.force, asked.device, asked.effort
        )

    @cached_property
    def model(self) -> Selection:
        """The language model, and the linears that are solved; nothing of it is copied."""
        source, config = language_model(self.job.checkpoint, self.job.config)
        found = {
            name: Linear(name, spec.gguf, spec.source, spec.role)
            for spec in self._planned(source, config)
            for name in spec.names
        }
        return Selection(self.job.checkpoint, source, config, found, {}, {})

    @cached_property
    def specs(self) -> dict[str, tuple[Spec, ...]]:
        """The tensors of the files that are made of each linear, by its name in the language model.

        Where the embedding serves as the head it goes by the head's name, as a run has it.
        """
        return by_source(self._planned(self.model.source, self.model.config))

    @property
    def tokenizer(self) -> TokenizerData:
        """The model's tokenizer."""
        return self.job.tokenizer

    @property
    def out(self) -> Path:
        """The first file, beside which the state of the run lies."""
        return self.job.paths[0]

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that are read."""
        return self.job.inputs

    @property
    def settings(self) -> str:
        """What the bytes of a block depend on, as --resume reports it."""
        types = [(o.quant, t.name, t.qtype.name) for o in self.job.outputs for t in o.tensors.values()]
        digest = hashlib.sha256(repr(types).encode()).hexdigest()[:12]
        quants, rounds = ", ".join(self.job.options.quants), rounds_text(self.job)
        return f"solver gptq of {quants}, types {digest}, damp {DAMP:g}, rounds {rounds}"

    @property
    def head(self) -> bool:
        """Whether the head is solved: its type, the embedding's where that is both, is one that can be."""
        return st.HEAD in self.model.linears

    def qtypes(self, spec: Spec) -> dict[int, QType]:
        """The types of a tensor, by the number of the output."""
        return {i: o.tensors[spec.gguf].qtype for i, o in enumerate(self.job.outputs)}

    def nbytes(self, name: str) -> int:
        """Bytes of a linear in all outputs."""
        return sum(
            qtype.nbytes(spec.values // spec.many)
            for spec in self.specs[name]
            for qtype in self.qtypes(spec).values()
        )

    def settings_of(self, name: str) -> str:
        """The types of a linear, for messages."""
        kinds = (qtype.name for spec in self.specs[name] for qtype in self.qtypes(spec).values())
        return ", ".join(dict.fromkeys(kinds))

    def _planned(self, source: WeightSource, config: ModelConfig) -> list[Spec]:
        """The tensors whose rows are rows of linears that the run sees; the head's is the last of them."""
        specs = plan(find_architecture(config.architecture).table, config, source.shapes())
        if config.tied:
            specs += [replace(spec, hf=st.HEAD, role="head") for spec in specs if spec.role == "embed"]
        return [spec for spec in specs if self._fed(spec)]

    def _fed(self, spec: Spec) -> bool:
        """Whether a tensor's rows are rows of linears that the run sees."""
        if spec.role == "head":
            return any(map(solvable, self.qtypes(spec).values()))
        return spec.role in LINEARS and spec.gguf.endswith(".weight")


def rounds_text(job: Job) -> str:
    """How often scales and codes are refined, for the file's keys."""
    if job.options.rounds is not None:
        return str(job.options.rounds)
    return ", ".join(f"{count} of {name}" for name, count in ROUNDS.items()) + ", 0 of others"
