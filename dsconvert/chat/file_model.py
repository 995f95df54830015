"""A GGUF file as a model to talk to, in llama.cpp; pictures through the projector beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dsconvert.chat.model import ChatText, Floats, Part, Stopped
from dsconvert.chat.picture import load_picture
from dsconvert.errors import UsageError
from dsconvert.runtimes.continued import Continued
from dsconvert.runtimes.llamacpp import Engine
from dsconvert.runtimes.mtmd import Known, Projector

MARKER = "<__media__>"  # mtmd's; kept out of what users type


class FileModel:
    """A model in llama.cpp; its projector is opened when the first picture comes."""

    def __init__(
        self, engine: Engine, context: int, mmproj: Path | None, threads: int, held: ExitStack
    ) -> None:
        self._engine, self._mmproj, self._threads, self._held = engine, mmproj, threads, held
        self._sequence = Continued(engine)
        self._projector: Projector | None = None
        self._pictures: dict[Path, npt.NDArray[np.uint8]] = {}
        self._embedded: Known = {}  # a picture goes through the towers once
        self.text = chat_text(engine)
        self.context = min(context, engine.n_ctx)  # which llama.cpp rounds up, and its batches not

    def embed(self, prompt: str, pictures: Sequence[Path]) -> list[Part]:
        """As Model says."""
        if pictures:
            return self._with_pictures(prompt, pictures)
        return [self._engine.tokenize(prompt, parse_special=True)]

    def read(self, part: Part, at: int, stopped: Stopped) -> Floats | None:
        """As Model says."""
        return self._sequence.read(part, at, stopped)

    def forget(self, length: int) -> int:
        """As Model says."""
        return self._sequence.forget(length)

    def _with_pictures(self, prompt: str, pictures: Sequence[Path]) -> list[Part]:
        if self._mmproj is None:
            raise UsageError(
                "pictures need the model's projector, and there is none beside the file",
                where=self._engine.path,
                hint="Give --mmproj FILE; `dsconvert gguf` writes it as mmproj-NAME.gguf",
            )
        if self._projector is None:
            opened = Projector(self._mmproj, self._engine, threads=self._threads)
            self._projector = self._held.enter_context(opened)
        for path in pictures:
            if path not in self._pictures:
                self._pictures[path] = load_picture(path)
        prompt = prompt.replace(MARKER, self._projector.marker)
        pixels = [self._pictures[path] for path in pictures]
        return list(self._projector.parts(prompt, pixels, self._embedded))


@contextmanager
def open_file_model(
    path: Path, *, mmproj: Path | None, context: int, threads: int, cpu: bool
) -> Iterator[FileModel]:
    """Load a GGUF file in llama.cpp with room for `context` tokens; raises ConversionError as Engine does."""
    with ExitStack() as held:
        engine = Engine(path, n_ctx=context, threads=threads, exact=False, cpu=cpu)
        held.enter_context(engine)
        yield FileModel(engine, context, mmproj, threads, held)


def chat_text(engine: Engine) -> ChatText:
    """How llama.cpp takes and gives a file's text; it stops at EOS, EOT, EOM and the ends that it knows."""
    special: dict[str, Any] = engine.special
    named = {f"{name}_token": special[name] for name in ("bos", "eos")}
    return ChatText(
        where=engine.path,
        template=engine.chat_template() or "",
        names={
            name: engine.piece(at, special=True).decode("utf-8", "replace") if at >= 0 else ""
            for name, at in named.items()
        },
        bos=special["bos"] if special["bos"] >= 0 else None,
        add_bos=bool(special["add_bos"]),
        stops=frozenset(engine.ends()),
        encode=lambda text: engine.tokenize(text, parse_special=True),
        piece=engine.piece,
        marker=MARKER,
    )
