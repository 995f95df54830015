"""What is proven of an EXL2 folder after it is written, from the folder alone against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from converters.exl2.output import Choice
from converters.exl2.plan import Job
from converters.exl2.reader import EXL2Model, open_model
from dsconvert.events import Check, Event, Step
from dsconvert.models.config import load_config
from dsconvert.models.language_model import language_model
from dsconvert.proof import output_folder as folder_proof
from dsconvert.texts.windows import Windows

WITHIN = 0.01  # bits per weight that the folder may lie beside what was asked for


def evaluation(job: Job) -> Windows:
    """The windows of held-out text that the result is judged on."""
    return folder_proof.held_out(job.tokenizer.encode, job.model.config, job.tokenizer.first_id)


def prove(job: Job, choice: Choice) -> Iterator[Event]:
    """Read the folder back and compare it with the checkpoint; one Check for each thing compared.

    `--effort off` checks nothing and says so. "quick" sizes the comparison of blocks and logits to some 20
    seconds, "full" runs all of it.
    """
    if job.run.effort == "off":
        yield Step("verification is off: the folder was not read back")
        return
    yield check_structure(job, choice, open_model(job.out))
    yield from prove_folder(job)


def prove_folder(job: Job) -> Iterator[Event]:
    """The part of the proof that holds for whatever chose the settings."""
    model = open_model(job.out)
    yield check_rate(job, model)
    yield folder_proof.check_companions(job.model.checkpoint.folder, job.out)
    yield from folder_proof.check_logits(
        (job.model.source, job.model.config),
        language_model(model, load_config(job.out)),
        evaluation(job),
        "full" if job.run.effort == "full" else "quick",
        model.limits,
        job.run.device,
    )


def check_structure(job: Job, choice: Choice, model: EXL2Model) -> Check:
    """Names, shapes and groups of the folder as read back are the planned ones."""
    planned = {(f"{choice.stem(job, n)}.weight", job.shape(n), g) for n, g in choice.groups.items()}
    stored = job.model.checkpoint.tensors
    planned |= {(out, stored[name].shape, ()) for out, name in job.kept.items()}
    groups = {f"{name}.weight": linear.groups for name, linear in model.linears.items()}
    found = {(name, shape, groups.get(name, ())) for name, shape in model.shapes().items()}
    detail = f"{len(model.linears)} linears quantized, {len(job.kept)} tensors in 16 bits"
    return Check("structure", planned == found, detail, len(planned ^ found))


def check_rate(job: Job, model: EXL2Model) -> Check:
    """The folder takes the bits per weight that were asked for."""
    asked = job.options.bpw
    detail = f"{model.bits:.3f} bits per weight in the blocks, {asked:g} asked for"
    return Check("bits per weight", abs(model.bits - asked) <= WITHIN, detail, model.bits)
