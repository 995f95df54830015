"""Which added tokens a checkpoint folder has: one reading of every file that names some.

As transformers 5 reads a folder (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`):
tokenizer.json first; then added_tokens_decoder of tokenizer_config.json, or, only where that key is absent,
added_tokens.json, in the order of the ids; then special tokens that a file names and no file gives an id.
A token that is known already keeps its id and takes the flags of the later file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError
from tokenizer_tools.library import check_length, guarded, read_object
from tokenizer_tools.vocabulary import FLAGS, AddedToken

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG, MAP, LIST = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# Roles whose token is added where it is only named; BOS and EOS that do not exist are refused instead.
ROLES = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
NAMED = ("bos_token", "eos_token", *ROLES)
NO_ID = -1
IGNORED = {
    "lstrip": "white space before it becomes tokens of its own there, and ids differ",
    "rstrip": "white space after it becomes tokens of its own there, and ids differ",
    "single_word": "it is a token inside a word too there, and ids differ",
}


@dataclass(frozen=True)
class Stated:
    """A token that a file beside tokenizer.json states; `token.id` is NO_ID where it only names it."""

    token: AddedToken
    file: str
    role: str = ""


def beside(folder: Path, config: Mapping[str, Any]) -> list[Stated]:
    """What the files beside tokenizer.json state, in the order in which transformers adds them.

    `config` is tokenizer_config.json. Raises TokenizerError for a file that is not of its form.
    """
    listed = "added_tokens_decoder" not in config
    mapped = read_object(folder / MAP) if listed else {}
    names = {**config, **mapped}
    special = frozenset(token.content for token in _contents(names))
    if listed:
        stated = list(_listed(read_object(folder / LIST), special, folder / LIST))
    else:
        stated = list(_decoder(config["added_tokens_decoder"] or {}, special, folder / CONFIG))
    return [*sorted(stated, key=lambda found: found.token.id), *_named(names, mapped)]


def _decoder(entries: object, special: Set[str], path: Path) -> Iterator[Stated]:
    if not isinstance(entries, dict):
        raise TokenizerError("added_tokens_decoder is not an object", where=path, hint="Fetch the file again")
    for key, entry in entries.items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not (key.isascii() and key.isdigit() and len(key) < 10 and isinstance(content, str) and content):
            raise TokenizerError(
                f"added_tokens_decoder has an entry that is not id to token: {key[:40]!r}", where=path
            )
        yield Stated(_token(int(key), entry, entry.get("special") is True or content in special), CONFIG)


def _listed(entries: Mapping[str, Any], special: Set[str], path: Path) -> Iterator[Stated]:
    """added_tokens.json: text to id; a token is special where another file names it so."""
    for content, i in entries.items():
        if type(i) is not int or i < 0 or not content:
            raise TokenizerError(
                f"has an entry that is not token to id: {content[:40]!r}",
                where=path,
                hint="Fetch the file again",
            )
        entry = {"content": content, "normalized": content not in special}
        yield Stated(_token(i, entry, content in special), LIST)


def _named(names: Mapping[str, Any], mapped: Mapping[str, Any]) -> Iterator[Stated]:
    for role in (*ROLES, *LISTS):
        for token in _contents({role: names.get(role)}):
            yield Stated(token, MAP if role in mapped else CONFIG, role)


def _contents(names: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The special tokens that a config names, each as text or as an object, without ids."""
    values = [names.get(role) for role in NAMED]
    for key in LISTS:
        listed = names.get(key)
        values += listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else []
    for value in values:
        entry = value if isinstance(value, dict) else {"content": value}
        if isinstance(entry.get("content"), str) and entry["content"]:
            yield _token(NO_ID, entry, True)


def _token(i: int, entry: Mapping[str, Any], special: bool) -> AddedToken:
    flags = {name: entry.get(name) is True for name in FLAGS}
    return AddedToken(i, str(entry["content"]), special, **flags)


def without_rows(
    own: Mapping[int, AddedToken], stated: list[Stated], rows: int
) -> tuple[dict[int, AddedToken], list[Stated], list[str]]:
    """The tokens whose ids have an embedding row, and a note that names the others."""
    lost = {i: token.content for i, token in own.items() if i >= rows}
    lost |= {found.token.id: found.token.content for found in stated if found.token.id >= rows}
    if not lost:
        return dict(own), stated, []
    listed = ", ".join(f"{content[:40]!r} ({i})" for i, content in sorted(lost.items())[:8])
    note = (
        f"the embedding has {rows} rows, so these added tokens are left out: {listed}"
        f"{' ...' if len(lost) > 8 else ''}; with resize_token_embeddings before saving they would be kept"
    )
    kept = {i: token for i, token in own.items() if i < rows}
    gone = frozenset(lost.values())
    return kept, [found for found in stated if found.token.content not in gone], [note]


def add(
    library: Tokenizer, own: Mapping[int, AddedToken], stated: list[Stated], rows: int, folder: Path
) -> tuple[dict[int, AddedToken], list[str]]:
    """Give `library` the stated tokens as transformers does; all added tokens by id, and notes.

    `own` are those of tokenizer.json. Raises TokenizerError where added_tokens_decoder contradicts
    tokenizer.json, and where a file gives a token an id that the library cannot give.
    """
    work = _Adding(library, dict(own), rows, folder)
    for found in stated:
        known = _lookup(library, found.token.content, folder)
        if known is not None:
            work.known(found, known)
        else:
            work.new(found, _owner(library, found.token.id) if found.token.id != NO_ID else None)
    if work.news:
        listed = ", ".join(work.news[:8]) + (" ..." if len(work.news) > 8 else "")
        work.notes.insert(0, f"added tokens that only files beside tokenizer.json have: {listed}")
    return dict(sorted(work.added.items())), work.notes


@dataclass
class _Adding:
    """The tokens so far, the notes, and whose ids a file beside tokenizer.json gave."""

    library: Tokenizer
    added: dict[int, AddedToken]
    rows: int
    folder: Path
    notes: list[str] = field(default_factory=list)
    news: list[str] = field(default_factory=list)
    given: set[int] = field(default_factory=set)

    def known(self, found: Stated, i: int) -> None:
        """A token that has the id `i` already: it takes the flags of the file that states it with an id."""
        token, before = found.token, self.added.get(i)
        if token.id == NO_ID or (token.id == i and before is not None and found.file == LIST):
            return
        if token.id != i:
            if found.file == CONFIG and i not in self.given:
                raise _contradiction(found, self.library, self.folder)
            self.notes.append(f"{found.file} gives {token.content[:60]!r} the id {token.id}; it keeps {i}")
            return
        special = token.special or (before is not None and before.special)
        after = replace(token, special=special)
        if after != before:
            _give(self.library, after, self.folder)
        self.added[i] = after

    def new(self, found: Stated, owner: str | None) -> None:
        """A token that is not known; `owner` is the token that has its id, if there is one."""
        token, name = found.token, found.token.content[:60]
        if owner is not None:
            if found.file != LIST or token.id not in self.added:
                raise _contradiction(found, self.library, self.folder)
            self.notes.append(
                f"{LIST} gives the id {token.id} to {name!r}, tokenizer.json to {owner[:60]!r}: the latter "
                f"wins, and {name!r} is not a token"
            )
            return
        if token.id == NO_ID and _next_id(self.library, self.added) >= self.rows:
            self.notes.append(
                f"{found.file} names {name!r} as {found.role}, which the vocabulary does not have; left out"
            )
            return
        _give(self.library, token, self.folder)
        i = _lookup(self.library, token.content, self.folder)
        if i is None or token.id not in (NO_ID, i):
            raise TokenizerError(
                f"says that the token {token.id} is {name!r}; the tokenizers library gives it {i}",
                where=self.folder / found.file,
                why="no file gives a token to the ids before it",
                hint="Correct the id, or name the tokens in between",
            )
        self.added[i] = replace(token, id=i)
        self.given.add(i)
        if token.id != NO_ID:
            self.news.append(f"{name!r} ({i})")
            return
        self.notes.append(
            f"{found.file} names {name!r} as {found.role}, and no file gives it an id: it has the next, {i}"
        )


def flag_notes(added: Mapping[int, AddedToken]) -> list[str]:
    """A note for each flag that llama.cpp's tokenizer does not heed, with the tokens that have it.

    It has lstrip and rstrip for a few model names of its own (src/llama-vocab.cpp), and no single_word.
    """
    notes = []
    for flag, effect in IGNORED.items():
        listed = [f"{token.content[:40]!r} ({i})" for i, token in added.items() if getattr(token, flag)]
        if listed:
            more = " ..." if len(listed) > 8 else ""
            notes.append(f"llama.cpp does not heed {flag} of {', '.join(listed[:8])}{more}: {effect}")
    return notes


def with_added(raw: Mapping[str, Any], added: Mapping[int, AddedToken]) -> str:
    """The text of the tokenizer.json `raw` with these added tokens in the place of its own."""
    tokens = [asdict(token) for token in added.values()]
    return json.dumps({**raw, "added_tokens": tokens}, ensure_ascii=False)


def _give(library: Tokenizer, token: AddedToken, folder: Path) -> None:
    from tokenizers import AddedToken as Given

    fields = {key: value for key, value in asdict(token).items() if key != "id"}
    check_length(token.content, folder)
    with guarded("add a token", folder):
        library.add_tokens([Given(**fields)])


def _lookup(library: Tokenizer, content: str, folder: Path) -> int | None:
    with guarded("look up an added token", folder):
        found: int | None = library.token_to_id(content)
    return found


def _owner(library: Tokenizer, i: int) -> str | None:
    with guarded("look up an added token", ""):
        found: str | None = library.id_to_token(i)
    return found


def _next_id(library: Tokenizer, added: Mapping[int, AddedToken]) -> int:
    """The id that the library gives to a token that it does not know."""
    return max(int(library.get_vocab_size(with_added_tokens=False)), max(added, default=-1) + 1)


def _contradiction(found: Stated, library: Tokenizer, folder: Path) -> TokenizerError:
    token = found.token
    owner, other = _owner(library, token.id), _lookup(library, token.content, folder)
    known = f"it is {owner[:60]!r}" if owner is not None else "it does not exist"
    return TokenizerError(
        f"says that the token {token.id} is {token.content[:60]!r}; in tokenizer.json {known}",
        where=folder / found.file,
        why=f"there {token.content[:60]!r} is {other}" if other is not None else "",
        hint="The files are not of the same model; fetch both again",
    )
