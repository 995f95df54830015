"""One file of a Hugging Face dataset: from the local cache, or from the hub with quick, plain failures."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from dsconvert.errors import CheckpointError, short
from dsconvert.events import Event, Step, Warn
from dsconvert.network import TEMPORARY, TRANSPORTS, host

TIMEOUT = 10.0  # seconds that the hub has for the first answer
TRIES = 2  # the client's own retries take about 24 s before they say anything


class Unreachable(CheckpointError):
    """The file is not in the local cache, and there is no network, or it may not be used."""


@dataclass(frozen=True)
class HubFile:
    """A file of a dataset repository in the local cache; `commit` is the repository's, 40 hex digits."""

    path: Path
    repository: str
    name: str
    commit: str


def fetch(repository: str, name: str, *, offline: bool = False) -> Generator[Event, None, HubFile]:
    """The file `name` of a dataset: from the hub, or from the local cache when that has its newest version.

    Yields what is going on. A file in the cache is used where the hub cannot be asked. Raises Unreachable,
    and CheckpointError for what the hub refuses or a download that breaks.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

    where = f"{repository}/{name}"
    cached = _cached(repository, name)
    if offline or constants.HF_HUB_OFFLINE:
        if cached:
            return cached
        raise Unreachable(
            "is not in the local cache",
            where=where,
            why="--offline is given" if offline else "HF_HUB_OFFLINE is set",
            hint="Run once with a network, or give a local file or a mirror folder",
        )
    url = hf_hub_url(repository, name, repo_type="dataset")
    patience = f"without a network this gives up after about {TRIES * TIMEOUT:.0f} s"
    yield Step(f"asking {host(url)} for {where}; {patience}")
    problem: Exception | None = None
    for attempt in range(TRIES):
        try:
            found = get_hf_file_metadata(url, timeout=TIMEOUT)
            break
        except Exception as error:  # the libraries below have no common class
            if not _temporary(error):
                raise _refused(where, error) from None
            problem = error
            if attempt + 1 < TRIES:
                yield Step(f"no answer ({short(error)}); trying once more")
    else:
        assert problem is not None
        if cached:
            yield Warn(f"{where}: the hub does not answer ({short(problem)}); the cached copy is used")
            return cached
        raise _silent(where, problem)
    if cached and cached.commit == found.commit_hash:
        return cached
    yield Step(f"downloading {where}" + (f", {found.size / 1e6:.0f} MB" if found.size else ""))
    return _download(repository, name)


def _cached(repository: str, name: str) -> HubFile | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = hf_hub_download(repository, name, repo_type="dataset", local_files_only=True)
    except LocalEntryNotFoundError:
        return None
    return _placed(path, repository, name)


def _placed(path: str, repository: str, name: str) -> HubFile:
    """The client's path is .../snapshots/COMMIT/NAME."""
    commit = Path(path).parts[-len(Path(name).parts) - 1]
    return HubFile(Path(path), repository, name, commit)


def _download(repository: str, name: str) -> HubFile:
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(repository, name, repo_type="dataset")
    except Exception as error:  # see fetch
        raise _refused(f"{repository}/{name}", error) from None
    return _placed(path, repository, name)


def _temporary(error: Exception) -> bool:
    """Whether there was no answer, or one that says: later."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TEMPORARY
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in TRANSPORTS


def _silent(where: str, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        hint = "The hub is there but busy or broken: try again later, or give a local file"
        return CheckpointError("cannot be fetched", where=where, why=short(error), hint=hint)
    hint = "Check the network, or give a local file or a mirror folder"
    return Unreachable("the hub cannot be reached", where=where, why=short(error), hint=hint)


def _refused(where: str, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        what, hint = "is gated", "Accept its terms on its page, then run `hf auth login`"
    elif isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        what, hint = "may not be read", "Log in with `hf auth login`, or give a local file"
    elif isinstance(error, errors.RepositoryNotFoundError):
        what = "is in no repository that the hub shows"
        hint = "Check HF_ENDPOINT and your login (`hf auth whoami`), or give a local file"
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        what, hint = "is not in its repository", "Check HF_ENDPOINT; a mirror must hold the same files"
    else:
        what, hint = "cannot be downloaded", "Run the same command again, or give a local file"
    return CheckpointError(what, where=where, why=short(error), hint=hint)
