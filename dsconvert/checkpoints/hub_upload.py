"""Uploads an output to the Hugging Face hub: what can be known is asked for before any work."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsconvert.checkpoints.hub_listing import list_files, the_hub
from dsconvert.checkpoints.hub_model import HUB_ID, Repository
from dsconvert.checkpoints.remote_model import remote_file
from dsconvert.errors import ConversionError, OutputError, UsageError, quoted, short

CARD = "README.md"
CARD_LIMIT = 8 << 20
LOGIN = "Run `hf auth login` with a token that may write, or set HF_TOKEN to one"


def check_push(name: str) -> None:
    """See that the user may write to a repository, as far as the hub tells; UsageError, OutputError."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import LocalTokenNotFoundError

    if HUB_ID.fullmatch(name) is None or "@" in name:
        raise UsageError(f"--push-to {quoted(name)} is not of the form ORG/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UsageError("--push-to needs the network, and HF_HUB_OFFLINE is set", hint="Unset it")
    try:
        user: Any = HfApi().whoami()
    except LocalTokenNotFoundError:
        raise OutputError("nobody is logged in", where=name, hint=LOGIN) from None
    except Exception as error:  # the library lets its HTTP client's errors through
        raise _upload_error(name, error) from None
    owners = [user.get("name"), *(org.get("name") for org in user.get("orgs") or [])]
    role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise OutputError(
            "may not be written with this token", where=name, why="It may read only", hint=LOGIN
        )
    if name.split("/", maxsplit=1)[0] not in owners:
        why = (
            f"{quoted(user.get('name'))} is not {quoted(name.split('/', maxsplit=1)[0])}, nor a member of it"
        )
        raise OutputError("may not be written by this user", where=name, why=why, hint=LOGIN)


def card_of(name: str) -> str | None:
    """The text of a repository's README.md; None where there is none, or no repository yet.

    Raises OutputError and CheckpointError for what the hub cannot tell.
    """
    from huggingface_hub import HfApi

    try:
        if not HfApi().repo_exists(name):
            return None
    except Exception as error:  # as above
        raise _upload_error(name, error) from None
    hub = the_hub()
    listing = list_files(hub, Repository(name))
    if not 0 <= listing.sizes.get(CARD, -1) <= CARD_LIMIT:
        return None if CARD not in listing.sizes else ""
    return remote_file(hub, listing, CARD).read(0, listing.sizes[CARD]).decode("utf-8", "replace")


def push(
    name: str, files: Mapping[str, Path | bytes], message: str, private: bool, places: Sequence[Path]
) -> str:
    """Upload files by their names in the repository, in one commit; makes it if need be. Returns its address.

    `places` are the outputs that hold the files: an OutputError's hint says how to upload them by hand.
    """
    import huggingface_hub.utils as client
    from huggingface_hub import CommitOperationAdd, HfApi

    if not sys.stderr.isatty():
        getattr(client, "disable_progress_bars")()  # noqa: B009 - its types leave it out
    api = HfApi()
    try:
        url = api.create_repo(name, private=private or None, exist_ok=True)
        added = [CommitOperationAdd(path, file) for path, file in files.items()]
        api.create_commit(name, added, commit_message=message)
    except Exception as error:  # as above
        by_hand = " and ".join(f"hf upload {name} {shlex.quote(str(place))}" for place in places)
        raise _upload_error(name, error, f"What was made is complete; by hand: {by_hand}") from None
    return str(url)


def _upload_error(name: str, error: Exception, by_hand: str = "") -> ConversionError:
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__  # the client puts its own error around an answer's
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
    if status in (401, 403):
        what, hint = "may not be written", LOGIN
    elif status:
        what, hint = "cannot be written", "Look at its page, and run the same command again"
    else:
        what, hint = "the hub cannot be reached", "Check the network, and run the same command again"
    return OutputError(what, where=name, why=short(cause), hint=". ".join(filter(None, (hint, by_hand))))
