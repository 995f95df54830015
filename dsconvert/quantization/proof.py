"""The proof of a folder that a calibrated conversion wrote: what `dsconvert verify` proves of it."""

from __future__ import annotations

from collections.abc import Callable, Generator

from dsconvert.events import Event, Step
from dsconvert.proof.options import ProofOptions
from dsconvert.proof.prove import prove_conversion
from dsconvert.proof.sources import Opened, Reference, StoredTensors
from dsconvert.quantization.plan import Job

TEMPLATE = "chat_template.jinja"


def prove_folder(
    job: Job, opened: Callable[[], Opened], planned: StoredTensors | None
) -> Generator[Event, None, None]:
    """The folder as read back by `opened` against the checkpoint; one Check for each thing compared.

    `planned` are its tensors. `--effort off` checks nothing and says so.
    """
    if job.run.effort == "off":
        yield Step("verification is off: the folder was not read back")
        return
    options = ProofOptions(device=job.run.device, effort="full" if job.run.effort == "full" else "quick")
    yield from prove_conversion(opened(), reference_of(job), options, planned)


def reference_of(job: Job) -> Reference:
    """The checkpoint of a conversion as what its output is held against."""
    model = job.model
    made = model.files.get(TEMPLATE)  # for a layout whose template takes pictures
    templates = (job.tokenizer.chat.default, *([made] if isinstance(made, str) else []))
    return Reference(
        model.checkpoint, model.checkpoint.config, model.source, model.config, job.tokenizer, templates,
        name=str(job.run.model), add_bos=job.run.add_bos,
    )  # fmt: skip
