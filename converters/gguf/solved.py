"""The linears of a GGUF conversion by error feedback: the run that all calibrated formats share.

Every H is that of the checkpoint's own inputs, so one walk through the model serves all types asked for, and
no linear hangs on another. What is finished lies beside the output, for --resume, as of GPTQ and EXL2.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from converters.gguf import feedback
from converters.gguf.block_fields import Bytes
from converters.gguf.calibrate import check_measurable, linears, measured_keys
from converters.gguf.feedback import solvable, solve
from converters.gguf.feeding import ROUNDS, Feeding, rounds_text
from converters.gguf.layout import KeyValues
from converters.gguf.plan import Job, with_keys
from converters.gguf.qtypes import QType
from converters.gguf.write import refuse, targets
from dsconvert.checkpoints.output_files import PartFile
from dsconvert.checkpoints.output_plan import check_room
from dsconvert.checkpoints.safetensors_writer import Piece
from dsconvert.decoder import torch_decoder as st
from dsconvert.errors import UsageError
from dsconvert.events import Event, Warn
from dsconvert.models.stored_rows import stored_rows
from dsconvert.models.tensor_table import HEADS_TURNED, Spec
from dsconvert.quantization import known_inputs
from dsconvert.quantization.blocks import collected
from dsconvert.quantization.known_inputs import DAMP, remembering
from dsconvert.quantization.ranks import Ranks
from dsconvert.quantization.run import Coded, Run, SolveOne, Solving, begin, solve_blocks
from dsconvert.quantization.run_state import check_state
from dsconvert.quantization.tied_table import Sensitivities, looked_up_too, of_table

if TYPE_CHECKING:
    import torch

ENOUGH = 8  # calibration tokens by the inputs of the widest linear


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
    head = [spec.gguf for spec in feeding.specs.get(st.HEAD, ())]
    entries = [*linears(job), *head]
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
    sensitive: Sensitivities | None = None
    if feeding.head and feeding.model.config.tied:
        sensitive = yield from of_table(begun.run)
    yield from solve_blocks(
        begun.run,
        Solving(
            settings={name: feeding.settings_of(name) for name in names},
            nbytes={name: feeding.nbytes(name) for name in names},
            solve=_solver(feeding, sensitive),
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


def _solver(feeding: Feeding, sensitive: Sensitivities | None) -> SolveOne:
    """Solves a linear for every output; linears with the same inputs share the factor of their H.

    A head whose table is the embedding as well is `sensitive` to both.
    """
    asked = feeding.job.options.rounds
    inputs_of = remembering()

    def solve_one(
        name: str, spec: Spec, W: torch.Tensor, H: torch.Tensor, few: str | None, qtype: QType
    ) -> feedback.Solved:
        rounds = ROUNDS.get(qtype.name, 0) if asked is None else asked
        if H.ndim == 3:
            return _by_head(spec, W, H, qtype, rounds)
        inputs = inputs_of(H) if few is None else known_inputs.untrusted(H, few)
        # As the file has it that this one is held to.
        importance = feeding.job.importance.get(spec.gguf) if name == st.HEAD else inputs.importance
        return solve(W, inputs, qtype, rounds, importance)

    def solved(name: str, W: torch.Tensor, H: torch.Tensor, few: str | None) -> Coded:
        found: dict[str, feedback.Solved] = {}
        pieces: dict[str, Bytes] = {}
        by_head = H.ndim == 3
        if name == st.HEAD and sensitive is not None:
            H = looked_up_too(H, sensitive)
        for spec in feeding.specs[name]:
            if (spec.row.transform is HEADS_TURNED) != by_head:
                continue  # it is given other inputs
            for number, qtype in feeding.qtypes(spec).items():
                if qtype.name not in found:
                    found[qtype.name] = solve_one(name, spec, W, H, few, qtype)
                    refuse(found[qtype.name].flags, name, spec.gguf, qtype.name)
                rows = found[qtype.name].rows
                pieces[_piece(number, spec, name)] = rows if by_head else _stored(spec, name, rows)
        return _together(list(found.values())), pieces, None

    return solved


def _by_head(spec: Spec, W: torch.Tensor, H: torch.Tensor, qtype: QType, rounds: int) -> feedback.Solved:
    """A tensor of a matrix for each head, each with its own H [heads, K, K], from a linear's W."""
    import torch

    values = W.cpu().numpy()
    stored = stored_rows(spec, lambda _, a, b: values[a:b], 0, spec.rows)
    found = []
    for rows, own in zip(np.split(stored, len(H)), H, strict=True):
        inputs = known_inputs.measured(own)
        part = torch.from_numpy(np.ascontiguousarray(rows)).to(W.device)
        found.append(solve(part, inputs, qtype, rounds, inputs.importance))
    why = next((one.fell_back for one in found if one.fell_back), None)
    together = np.concatenate([one.rows for one in found])
    return replace(_together(found), rows=together, fell_back=why, flags=max(one.flags for one in found))


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
