"""The linears of a GGUF conversion by error feedback: the run that all calibrated formats share.

Every H is that of the checkpoint's own inputs, so one walk through the model serves all types asked for, and
no linear hangs on another. What is finished lies beside the output, for --resume, as of GPTQ and EXL2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from converters.gguf import feedback
from converters.gguf.block_fields import Bytes
from converters.gguf.calibrate import check_measurable, linears, measured_keys
from converters.gguf.feedback import solvable, solve
from converters.gguf.layout import KeyValues
from converters.gguf.plan import Job, with_keys
from converters.gguf.qtypes import QType
from converters.gguf.write import refuse, targets
from dsconvert.calibration.request import CalibrationRequest
from dsconvert.checkpoints.output_files import PartFile
from dsconvert.checkpoints.output_plan import check_room
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.decoder import linear_inputs
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import UsageError
from dsconvert.events import Event, Warn
from dsconvert.models.architectures import find_architecture
from dsconvert.models.language_model import language_model
from dsconvert.models.stored_rows import stored_rows
from dsconvert.models.tensor_table import HEADS_TURNED, SOLVE_ORDER, Spec, plan
from dsconvert.quantization.blocks import collected
from dsconvert.quantization.known_inputs import DAMP, remembering
from dsconvert.quantization.linears import Linear, Selection
from dsconvert.quantization.plan import RunOptions
from dsconvert.quantization.ranks import Ranks
from dsconvert.quantization.run import Coded, Run, SolveOne, Solving, begin, solve_blocks
from dsconvert.quantization.run_state import check_state
from tokenizer_tools.load import TokenizerData

if TYPE_CHECKING:
    import torch

ENOUGH = 8  # calibration tokens by the inputs of the widest linear
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
        linear_inputs.check_dense(config, self.job.checkpoint.folder)
        table = find_architecture(config.architecture).table
        found = {
            name: Linear(name, spec.gguf, source.shapes()[name], spec.role)
            for spec in plan(table, config, source.shapes())
            if self._fed(spec)
            for name in spec.names
        }
        return Selection(self.job.checkpoint, source, config, found, {}, {})

    @cached_property
    def specs(self) -> dict[str, list[Spec]]:
        """The tensors of the files that are made of each linear, by its name in the language model."""
        source, config = self.model.source, self.model.config
        specs = plan(find_architecture(config.architecture).table, config, source.shapes())
        return {
            name: [spec for spec in specs if name in spec.names and self._fed(spec)]
            for name in self.model.linears
        }

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
        """Whether the head is solved: it has a tensor of its own, and of a type that can be."""
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

    def _fed(self, spec: Spec) -> bool:
        """Whether a tensor's rows are rows of linears that the run sees."""
        if not spec.gguf.endswith(".weight") or spec.row.transform is HEADS_TURNED:
            return False
        if spec.role == "head":
            return any(map(solvable, self.qtypes(spec).values()))
        return spec.role in SOLVE_ORDER


def rounds_text(job: Job) -> str:
    """How often scales and codes are refined, for the file's keys."""
    if job.options.rounds is not None:
        return str(job.options.rounds)
    return ", ".join(f"{count} of {name}" for name, count in ROUNDS.items()) + ", 0 of others"


def check(job: Job) -> None:
    """See that the run has something to solve, and that its state has a place; raises ConversionError."""
    feeding = Feeding(job)
    kinds = {kind for name in feeding.model.linears for spec in feeding.specs[name] for kind in
             feeding.qtypes(spec).values()}  # fmt: skip
    if not any(map(solvable, kinds)):
        raise UsageError(
            "--solver gptq changes nothing",
            why=f"the matrices of {', '.join(job.options.quants)} are {', '.join(k.name for k in kinds)}, "
            "whose codes it does not choose",
            hint="Leave --solver out, or give --quant q4_k_m or the like",
        )
    check_measurable(job)
    check_state(feeding.out, job.options.resume, job.options.force)
    if not job.options.resume:  # the state, as large as the linears, lies beside the files
        files = sum(layout.nbytes for layout in job.layouts)
        check_room(feeding.out.parent, files + sum(map(feeding.nbytes, feeding.model.linears)))


@dataclass(frozen=True)
class Begun:
    """A conversion whose text is drawn: the job with the keys that tell of it, and the run."""

    job: Job
    feeding: Feeding
    run: Run


def start(stack: ExitStack, job: Job, ranks: Ranks) -> Generator[Event, None, Begun]:
    """Draw the text and open the state, which `stack` closes."""
    with ranks.together():
        check(job)
    feeding = Feeding(job)
    run = yield from begin(stack, feeding, ranks)
    widest = max(linear.shape[-1] for linear in feeding.model.linears.values())
    if run.calibration.report.tokens < ENOUGH * widest:
        yield Warn(
            f"{run.calibration.report.tokens:,} calibration tokens are few for linears of {widest:,} inputs: "
            "error feedback goes by chances of this text, and on another it may be no closer than the "
            f"importance matrix; give --calib-samples or --calib-len for {ENOUGH * widest:,} or more"
        )
    entries = [*linears(job), *(["output.weight"] if feeding.head else [])]
    keys: KeyValues = {
        **measured_keys(run.calibration, entries),
        "dsconvert.solver": ("string", "gptq"),
        "dsconvert.solver.damp": ("float32", DAMP),
        "dsconvert.solver.rounds": ("string", rounds_text(job)),
    }
    return Begun(with_keys(job, keys), feeding, run)


def solve_all(begun: Begun) -> Generator[Event, None, None]:
    """Solve every linear that the state does not hold yet; all processes call it."""
    feeding = begun.feeding
    names = list(feeding.model.linears)
    yield from solve_blocks(
        begun.run,
        Solving(
            settings={name: feeding.settings_of(name) for name in names},
            nbytes={name: feeding.nbytes(name) for name in names},
            solve=_solver(feeding),
            restore=None,
            head=feeding.head,
            against="the importance matrix",
            passes=_passes(feeding),
        ),
    )


def _passes(feeding: Feeding) -> float:
    """How much work a solve is: of each type the search, the walk, what rows lose, rounds of refinement."""
    kinds = {feeding.settings_of(name) for name in feeding.model.linears}
    types, asked = [kind for one in kinds for kind in one.split(", ")], feeding.job.options.rounds
    each = (6.0 + 5.0 * (ROUNDS.get(kind, 0) if asked is None else asked) for kind in types)
    return sum(each) / len(kinds)


def _solver(feeding: Feeding) -> SolveOne:
    """Solves a linear for every output; linears with the same inputs share the factor of their H."""
    asked = feeding.job.options.rounds
    inputs_of = remembering()

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        inputs = inputs_of(H)
        # As the file has it that this one is held to.
        importance = feeding.job.importance.get("output.weight") if name == st.HEAD else inputs.importance
        found: dict[str, feedback.Solved] = {}
        pieces: dict[str, Bytes] = {}
        for spec in feeding.specs[name]:
            for number, qtype in feeding.qtypes(spec).items():
                if qtype.name not in found:
                    rounds = ROUNDS.get(qtype.name, 0) if asked is None else asked
                    found[qtype.name] = solve(W, inputs, qtype, rounds, importance)
                    refuse(found[qtype.name].flags, name, spec.gguf, qtype.name)
                rows = found[qtype.name].rows
                pieces[_piece(number, spec, name)] = _stored(spec, name, rows)
        return _together(list(found.values())), pieces, None

    return solved


def _together(found: list[feedback.Solved]) -> feedback.Solved:
    """The figures of all types of a linear."""
    return replace(
        found[0],
        loss=sum(one.loss for one in found),
        rtn_loss=sum(one.rtn_loss for one in found),
        kept=sum(one.kept for one in found),
    )


def _piece(number: int, spec: Spec, name: str) -> str:
    """What the state calls the rows of a linear in a tensor of an output."""
    return f"{number}.{spec.gguf}.{spec.names.index(name)}"


def _stored(spec: Spec, name: str, rows: Bytes) -> Bytes:
    """The rows of blocks that a tensor takes of a linear's, in its own order."""
    each, index = spec.rows // spec.many, spec.names.index(name)
    return stored_rows(spec, lambda _, a, b: rows[a:b], index * each, (index + 1) * each).copy()


def finished(begun: Begun) -> tuple[Job, Mapping[str, Piece]]:
    """The job with a key that names what error feedback was impossible for, and the linears' blocks."""
    pieces, left = collected(begun.run.state)
    if not left:
        return begun.job, pieces
    names = sorted(spec.gguf for name in left for spec in begun.feeding.specs[name])
    return with_keys(begun.job, {"dsconvert.solver.left": ("array:string", names)}), pieces


def rest_of(begun: Begun) -> frozenset[str]:
    """The tensors that the run does not solve, by GGUF name."""
    fed = {spec.gguf for specs in begun.feeding.specs.values() for spec in specs}
    return frozenset(spec.gguf for spec in begun.job.specs) - fed


def write_solved(begun: Begun, job: Job, pieces: Mapping[str, Piece], parts: list[PartFile]) -> None:
    """Put the linears' blocks where the files have them."""
    for name, specs in begun.feeding.specs.items():
        for spec in specs:
            for number, target in enumerate(targets(job, parts, spec.gguf)):
                nbytes = target.qtype.nbytes(spec.values // spec.many)
                at = target.offset + spec.names.index(name) * nbytes
                for chunk in pieces[_piece(number, spec, name)].chunks():
                    target.part.write(chunk, at)
                    at += len(chunk)
