"""What a command that reads a model over the network says of it, and tidies up after it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dsconvert.errors import ConversionError
from dsconvert.events import Fetched

if TYPE_CHECKING:
    from dsconvert.checkpoints.remote_model import RemoteModel
    from dsconvert.commands.display import Display


@contextmanager
def remote_models(display: Display) -> Iterator[None]:
    """While a command works: say what it has read over the network, and close what it has opened.

    An error names the repository in place of the folder that is removed.
    """
    from dsconvert import console

    try:
        yield
        for model in _opened():
            traffic = model.traffic
            fetched = Fetched(str(model.repository), traffic.nbytes, traffic.answers, traffic.again)
            display.result(fetched.as_dict(), partial(console.say, said(fetched)))
    except ConversionError as error:
        for model in _opened():
            error.where = error.where.replace(str(model.folder), str(model.repository))
        raise
    finally:
        for model in _opened():
            model.close()
        _opened().clear()


def said(fetched: Fetched) -> str:
    """What was read over the network as a line of text."""
    anew = f", {fetched.again} of them asked for anew" if fetched.again else ""
    return (
        f"{fetched.name}: read {fetched.nbytes:,} bytes over the network in {fetched.answers} answers{anew}"
    )


def _opened() -> list[RemoteModel]:
    """The models that are read over the network; the module that reads them is loaded for those alone."""
    module = sys.modules.get("dsconvert.checkpoints.remote_model")
    return [] if module is None else module.opened
