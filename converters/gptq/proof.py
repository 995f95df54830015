"""What is proven of a GPTQ folder after it is written, from the folder alone against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from converters.gptq.plan import Job
from converters.gptq.reader import GPTQModel, open_model
from dsconvert.events import Check, Event, Step
from dsconvert.models.config import load_config
from dsconvert.models.language_model import language_model
from dsconvert.proof import output_folder as folder_proof
from dsconvert.texts.windows import Windows


def evaluation(job: Job) -> Windows:
    """The windows of held-out text that the result is judged on."""
    return folder_proof.held_out(job.tokenizer.encode, job.model.config, job.tokenizer.first_id)


def prove(job: Job) -> Iterator[Event]:
    """Read the folder back and compare it with the checkpoint; one Check for each thing compared.

    `--effort off` checks nothing and says so. "quick" sizes the comparison of blocks and logits to some 20
    seconds, "full" runs all of it.
    """
    mode = job.run.effort
    if mode == "off":
        yield Step("verification is off: the folder was not read back")
        return
    model = open_model(job.out)
    yield check_structure(job, model)
    yield folder_proof.check_companions(job.model.checkpoint.folder, job.out, job.model.files)
    yield from folder_proof.check_logits(
        (job.model.source, job.model.config),
        language_model(model, load_config(job.out)),
        evaluation(job),
        "full" if mode == "full" else "quick",
        f"gptq{job.options.bits}",
        job.run.device,
    )


def check_structure(job: Job, model: GPTQModel) -> Check:
    """Names, shapes and types of the folder as read back are the planned ones."""
    bits, stored = job.options.bits, job.model.checkpoint.tensors
    planned = {(linear.out, linear.shape, f"gptq{bits}") for linear in job.model.linears.values()}
    planned |= {(out, stored[name].shape, stored[name].dtype) for out, name in job.model.kept.items()}
    found = {(name, shape, model.dtype(name)) for name, shape in model.shapes().items()}
    detail = f"{len(model.linears)} linears of {bits} bits, {len(job.model.kept)} tensors kept"
    return Check("structure", planned == found, detail, len(planned ^ found))
