"""What is proven of GGUF files after they are written, from the files alone against the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from converters.gguf.opened import open_file, stored_tensors
from converters.gguf.output import Output
from converters.gguf.parse import open_gguf
from converters.gguf.plan import Job
from converters.gguf.projector import proof as projector_proof
from dsconvert.events import Event, Step
from dsconvert.libraries import TORCH, need
from dsconvert.machine import collector_paused
from dsconvert.models.language_model import language_model
from dsconvert.proof.options import Mode, ProofOptions
from dsconvert.proof.prove import check_libraries as check_proof
from dsconvert.proof.prove import prove_conversion
from dsconvert.proof.sources import Opened, Reference, StoredTensors, limits_name
from dsconvert.vision.plan import MODEL_TEMPLATE, Towers


def prove(job: Job) -> Iterator[Event]:
    """Every output as read back against the checkpoint; one Check for each thing compared.

    `--effort off` checks nothing and says so.
    """
    if job.options.effort == "off":
        yield Step("verification is off: the files were not read back")
        return
    options = asked_of(job)
    mode: Mode = "full" if options.effort == "full" else "quick"
    reference, texts = reference_of(job), []
    for output in job.outputs:
        with collector_paused():  # a vocabulary is a great many small objects, and no garbage
            opened = open_file(output.paths[0])
        yield from prove_conversion(opened, reference, options, planned(output))
        texts.append(opened)
    if job.towers is not None and job.projector is not None:
        events = prove_projector(job, job.towers, job.projector, texts, mode)
        yield from projector_proof.of_projector(events)


def asked_of(job: Job) -> ProofOptions:
    """What a conversion asks of its proof."""
    mode: Mode = "full" if job.options.effort == "full" else "quick"
    device = job.options.device if mode == "full" else "auto"  # else it is the calibration's
    return ProofOptions(effort=mode, device=device, threads=job.options.threads)


def check_libraries(job: Job) -> None:
    """Raises MissingLibrary where the conversion or its proof would need torch, and that is not installed."""
    if job.options.calibration is not None:
        need(*TORCH, what="calibration")
    if job.options.effort == "off":
        return
    instead = "convert with --effort off, which leaves the proof out"
    check_proof(language_model(job.checkpoint, job.config)[1], asked_of(job), instead)
    if job.towers is not None and job.projector is not None:
        projector_proof.check_libraries(job.towers, asked_of(job).effort, instead)


def reference_of(job: Job) -> Reference:
    """The checkpoint of a conversion as what its outputs are held against."""
    source, config = language_model(job.checkpoint, job.config)
    chat = job.tokenizer.chat
    templates = [chat.default]
    if job.towers is not None:
        templates.insert(0, chat.named.get(MODEL_TEMPLATE, ""))
    return Reference(
        job.checkpoint, job.config, source, config, job.tokenizer, tuple(templates),
        name=str(job.options.model), add_bos=job.options.add_bos,
    )  # fmt: skip


def planned(output: Output) -> StoredTensors:
    """Name, shape and type of every tensor of an output."""
    return frozenset((t.name, t.shape, t.qtype.name) for t in output.tensors.values())


def prove_projector(
    job: Job, towers: Towers, output: Output, texts: list[Opened], mode: Mode
) -> Iterator[Event]:
    """The projector as read back, with every text file that was made beside it."""
    file = open_gguf(output.paths[0])
    model = projector_proof.Pictured(job.checkpoint, job.config, job.tokenizer, towers)
    quant = projector_proof.projector_quant(file)
    pairs = [(open_gguf(text.path), projector_proof.limit_of(limits_name(text), quant)) for text in texts]
    yield from projector_proof.prove_pair(
        model, file, pairs, mode=mode, as_planned=stored_tensors(file) == planned(output)
    )
