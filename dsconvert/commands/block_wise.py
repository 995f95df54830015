"""What every conversion block by block takes besides its format's own options, and how it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.commands import shared_options as shared
from dsconvert.commands.calibration_options import calibration_options
from dsconvert.commands.display import Display
from dsconvert.commands.publish import Publish, publish_options
from dsconvert.commands.run import on_each_rank

if TYPE_CHECKING:
    from dsconvert.calibration.request import CalibrationRequest
    from dsconvert.checkpoints.locate import ModelPath
    from dsconvert.events import Event
    from dsconvert.quantization.ranks import Ranks

    Work = Callable[[Ranks], Iterator[Event]]


def block_wise(
    text: str | None = "c4", purpose: str = "."
) -> Callable[[Callable[..., Work]], Callable[..., int]]:
    """Add the options to a function that makes the conversion: it receives `run`, a RunOptions, and its own.

    `text` and `purpose` are those of `calibration_options`; where no text is named, `run` has the usual one.
    """

    def add(conversion: Callable[..., Work]) -> Callable[..., int]:
        @wraps(conversion)
        def running(
            *,
            model_path: ModelPath,
            calibration: CalibrationRequest | None,
            add_bos: bool | None,
            out: Path | None,
            resume: bool,
            force: bool,
            device: str,
            effort: str,
            publish: Publish,
            display: Display,
            **own: Any,
        ) -> int:
            from dsconvert.calibration.request import CalibrationRequest
            from dsconvert.quantization.plan import RunOptions

            run = RunOptions(
                model_path, calibration or CalibrationRequest(), add_bos, out, resume, force, device, effort
            )
            work = conversion(run=run, **own)
            return on_each_rank(work, lambda events: display.events(publish.after(events)))

        options: tuple[Callable[..., Any], ...] = (
            calibration_options(text, 2048, purpose),
            shared.bos_option,
            shared.out_option(),
            shared.hub_options,
            shared.resume_option,
            publish_options,
            shared.force_option,
            shared.device_option,
            shared.conversion_effort,
        )
        return shared.apply(running, options)

    return add
