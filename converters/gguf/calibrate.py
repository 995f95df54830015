"""Makes an importance matrix of calibration text: as a file, or on the way of a conversion."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from converters.gguf import importance, mixtures
from converters.gguf.importance import Floats, ImportanceMatrix
from converters.gguf.layout import KeyValues
from converters.gguf.plan import Job, with_keys
from dsconvert.calibration.record import Calibration, CalibrationReport
from dsconvert.calibration.request import CalibrationRequest, calibrate
from dsconvert.events import Event, Step, Warn
from dsconvert.models.config import ModelConfig
from dsconvert.models.language_model import language_model
from dsconvert.models.tensor_table import SOLVE_ORDER
from dsconvert.models.weights import WeightSource
from dsconvert.texts.builtin import evaluation_page
from tokenizer_tools.load import TokenizerData

EVALUATION = 20_000  # characters of the text that results are judged on, for the report on overlap


def draw_windows(
    wanted: CalibrationRequest, tokenizer: TokenizerData, context: int
) -> Generator[Event, None, Calibration]:
    """The calibration windows of a model that takes `context` tokens; raises what `calibrate` raises."""
    (held,) = tokenizer.encode([evaluation_page(EVALUATION)])
    wanted = replace(wanted, bos=tokenizer.first_id)
    windows = np.array([held], np.int64)
    return (yield from calibrate(wanted, tokenizer.encode, context, windows, tokenizer.render))


def measure_inputs(
    source: WeightSource, config: ModelConfig, drawn: Calibration, device: str = "auto"
) -> Generator[Event, None, dict[str, Floats]]:
    """The tensors of an imatrix file: `source` is a decoder that runs over the windows drawn."""
    from dsconvert.decoder import importance as input_importance
    from dsconvert.decoder import torch_decoder as st

    place = st.pick_device(device)
    decoder = st.open_decoder(source, config, place, st.pick_dtype(None, place))
    found = yield from input_importance.measure_importance(decoder, drawn.tokens)
    return input_importance.tensors(found)


def file_keys(report: CalibrationReport) -> KeyValues:
    """The keys of an imatrix file: llama.cpp's, and the report on the calibration text."""
    return {
        "general.type": ("string", "imatrix"),
        "imatrix.datasets": ("array:string", [dataset(report)]),
        "imatrix.chunk_count": ("uint32", report.samples),
        "imatrix.chunk_size": ("uint32", report.length),
        importance.REPORT: ("string", report_text(report)),
    }


def dataset(report: CalibrationReport) -> str:
    return f"{report.text} sha256:{report.fingerprint}"


def report_text(report: CalibrationReport) -> str:
    return json.dumps(report.as_dict(), ensure_ascii=False)


def plan_measured(job: Job) -> Generator[Event, None, tuple[Job, Calibration | None]]:
    """Draw the text that the conversion asks for, and plan anew with the keys that describe it.

    None where there is nothing to measure for. Raises UsageError where a mixture needs more than a
    measurement can give, and what `draw_windows` raises.
    """
    wanted = job.options.calibration
    if wanted is None:
        return job, None
    if not importance.takers(job.outputs):
        yield Warn("--calib changes nothing: no tensor gets a type that takes an importance matrix")
        return job, None
    check_measurable(job)
    drawn = yield from draw_windows(wanted, job.tokenizer, job.config.context_length)
    return with_keys(job, measured_keys(drawn, linears(job))), drawn


def linears(job: Job) -> list[str]:
    """The tensors that a measurement has entries for, by GGUF name."""
    roles = (*SOLVE_ORDER, "latent", "weigher")
    return [spec.gguf for spec in job.specs if spec.role in roles and spec.gguf.endswith(".weight")]


def check_measurable(job: Job) -> None:
    """Raises UsageError where a mixture needs importance for more than a measurement has entries for."""
    measured = set(linears(job))
    for output in job.outputs:
        lacking = {n: t.qtype.name for n, t in output.tensors.items() if n not in measured}
        mixtures.check_importance(output.quant, lacking)


def measured_keys(drawn: Calibration, entries: Sequence[str]) -> KeyValues:
    """The keys of a file that tell of a measurement with these entries, known before it is made."""
    return _matrix(drawn, {}, dict.fromkeys(entries, ""), {}).keys


def weighed(job: Job, drawn: Calibration | None) -> Generator[Event, None, Job]:
    """The job with the importance of its inputs, measured on the text drawn."""
    if drawn is None:
        return job
    yield Step(f"measuring on {drawn.report.tokens:,} tokens of {drawn.report.text}")
    source, config = language_model(job.checkpoint, job.config)
    tensors = yield from measure_inputs(source, config, drawn, job.options.device)
    values, unusable, untouched = importance.quotients(tensors)
    values |= job.importance  # of embedding and head, where types are chosen by cost
    matrix = _matrix(drawn, values, unusable, untouched)
    weights, unweighted = importance.weigh(matrix, job.outputs)
    for note in unweighted:
        yield Warn(note)
    return replace(job, importance=weights)


def _matrix(
    drawn: Calibration,
    values: dict[str, Floats],
    unusable: Mapping[str, str],
    untouched: Mapping[str, tuple[int, ...]],
) -> ImportanceMatrix:
    report = drawn.report
    return ImportanceMatrix(
        None, values, (dataset(report),), report.samples, dict(unusable), report_text(report), untouched
    )
