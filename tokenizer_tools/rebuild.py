"""A tokenizer's GGUF keys, and the tokenizer rebuilt from such keys alone.

Besides the standard keys (tokenizer.ggml.*, tokenizer.chat_template, tokenizer.huggingface.json) there are
`dsconvert.pre_tokenizer.*` (see steps.py) and, so that the rebuilt tokenizer is the source's exactly:

    dsconvert.tokenizer.ignore_merges    bool: a piece that is a token is taken whole before any merge
    dsconvert.tokenizer.normalizer       string, only when there is one: nfc
    dsconvert.tokenizer.spaces           string, only of llama's: how a space comes before a text (spm.py)
    dsconvert.tokenizer.added.FLAG       array of uint32: the added tokens with normalized, lstrip, ...;
                                         only when there are some

A value is a pair (GGUF type, plain value); the types are string, bool, uint32, and array:TYPE.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dsconvert.errors import TokenizerError
from tokenizer_tools import spm
from tokenizer_tools.kinds import BYTE_LEVEL, SENTENCEPIECE
from tokenizer_tools.library import build_tokenizer, guarded, open_json
from tokenizer_tools.load import TokenizerData
from tokenizer_tools.runtimes import by_name
from tokenizer_tools.steps import PreTokenizer, Value, from_gguf, to_gguf, to_json
from tokenizer_tools.stops import stop_keys
from tokenizer_tools.vocabulary import BYTE, CONTROL, FLAGS, NORMAL, UNKNOWN, UNUSED, USER_DEFINED

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GGML = "tokenizer.ggml."
EXTRA = "dsconvert.tokenizer."
ITEMS: dict[str, type] = {"tokens": str, "token_type": int, "merges": str, "scores": float}
ADDED = (CONTROL, USER_DEFINED, UNKNOWN)
ID_KEYS = {
    "bos": GGML + "bos_token_id",
    "eos": GGML + "eos_token_id",
    "unk": GGML + "unknown_token_id",
    "pad": GGML + "padding_token_id",
}


def gguf_keys(data: TokenizerData, pre_name: str) -> dict[str, Value]:
    """Every tokenizer key of the GGUF file: name -> (value type, value).

    `pre_name` is what `resolve` found. BOS and EOS flags are always written: a runtime's default differs
    from one pre-tokenizer name to the next.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> keys = gguf_keys(data, "deepseek-llm")
    >>> keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.add_bos_token"]
    (('uint32', 2000), ('bool', True))
    """
    keys: dict[str, Value] = {
        GGML + "model": ("string", data.kind),
        GGML + "pre": ("string", pre_name),
        GGML + "tokens": ("array:string", list(data.tokens)),
        GGML + "token_type": ("array:int32", list(data.types)),
        **OWN_KEYS[data.kind](data),
    }
    keys |= {ID_KEYS[name]: ("uint32", data.special[name]) for name in ID_KEYS if name in data.special}
    ends = stop_keys(data.tokens, data.stops, data.eos_id)
    keys |= {key: ("uint32", i) for key, i in ends.items()}
    keys[GGML + "add_bos_token"] = ("bool", data.add_bos)
    keys[GGML + "add_eos_token"] = ("bool", data.add_eos)
    if data.chat.default:
        keys["tokenizer.chat_template"] = ("string", data.chat.default)
    for name, text in data.chat.named.items():
        keys[f"tokenizer.chat_template.{name}"] = ("string", text)
    if data.chat.named:
        keys["tokenizer.chat_templates"] = ("array:string", list(data.chat.named))
    keys["tokenizer.huggingface.json"] = ("string", data.json)
    keys |= OUR_KEYS[data.kind](data)
    for flag in FLAGS:
        flagged = [token.id for token in data.added if getattr(token, flag)]
        if flagged:
            keys[f"{EXTRA}added.{flag}"] = ("array:uint32", flagged)
    return keys


def _merge_keys(data: TokenizerData) -> dict[str, Value]:
    return {GGML + "merges": ("array:string", list(data.merges))}


def _score_keys(data: TokenizerData) -> dict[str, Value]:
    return {
        GGML + "scores": ("array:float32", list(data.scores)),
        GGML + "add_space_prefix": ("bool", data.spaces != spm.NEVER),
    }


def _step_keys(data: TokenizerData) -> dict[str, Value]:
    keys = to_gguf(data.spec)
    keys[EXTRA + "ignore_merges"] = ("bool", data.ignore_merges)
    if data.normalizer:
        keys[EXTRA + "normalizer"] = ("string", data.normalizer)
    return keys


def _space_keys(data: TokenizerData) -> dict[str, Value]:
    return {EXTRA + "spaces": ("string", data.spaces)}


# What each kind has of the standard's keys, and of ours.
OWN_KEYS = {BYTE_LEVEL.model: _merge_keys, SENTENCEPIECE.model: _score_keys}
OUR_KEYS = {BYTE_LEVEL.model: _step_keys, SENTENCEPIECE.model: _space_keys}


def rebuild(metadata: Mapping[str, Any], where: object = "") -> Tokenizer:
    """The `tokenizers.Tokenizer` that a GGUF file's metadata (key -> plain value) states.

    Encoding with special tokens adds BOS and EOS as the file says. Raises TokenizerError when the file is
    of another kind, or names a step or a pre-tokenizer that is not known here.

    >>> from dsconvert.checkpoints.locate import locate
    >>> from tokenizer_tools.load import load_tokenizer
    >>> data = load_tokenizer(locate("sample:"), rows=2048)
    >>> keys = {name: value for name, (_, value) in gguf_keys(data, "deepseek-llm").items()}
    >>> rebuild(keys).encode("a b").ids
    [2000, 64, 279]
    """
    build = BUILDERS.get(str(metadata.get(GGML + "model")))
    if build is None:
        raise TokenizerError(
            f"has a {metadata.get(GGML + 'model')!r} tokenizer; gpt2 (byte-level BPE) and llama "
            "(SentencePiece-like BPE) are read",
            where=where,
        )
    return build(metadata, where)


def _of_steps(metadata: Mapping[str, Any], where: object) -> Tokenizer:
    """From the tokens, merges and `dsconvert.pre_tokenizer.*`, without a look at tokenizer.huggingface.json;
    from that one where the spec is not there; else by what the runtime does under `tokenizer.ggml.pre`.
    """
    spec = from_gguf(metadata, where)
    if spec is not None:
        return _byte_level(metadata, spec, bool(metadata.get(EXTRA + "ignore_merges")), where)
    whole = metadata.get("tokenizer.huggingface.json")
    if isinstance(whole, str):
        return open_json(whole, where)[1]
    name = metadata.get(GGML + "pre")
    row = by_name(str(name))
    if row is None:
        raise TokenizerError(
            f"names the pre-tokenizer {name!r}, which is not known here, and carries no steps",
            where=where,
            hint="Convert the model again from its checkpoint, or use the checkpoint's tokenizer.json",
        )
    return _byte_level(metadata, row.runtime, row.ignore_merges, where)


def _byte_level(
    metadata: Mapping[str, Any], spec: PreTokenizer, ignore_merges: bool, where: object
) -> Tokenizer:
    merges = [_pair(merge, where) for merge in _array(metadata, "merges", where)]
    return _from_parts(metadata, _around(metadata, spec), merges, {"ignore_merges": ignore_merges}, where)


def _pair(merge: str, where: object) -> tuple[str, str]:
    left, space, right = merge.partition(" ")
    if not space or " " in right:
        raise TokenizerError("has a merge that is not two tokens", where=where, why=repr(merge[:60]))
    return left, right


def _of_scores(metadata: Mapping[str, Any], where: object) -> Tokenizer:
    """From the tokens, scores and types alone, as llama.cpp does; `dsconvert.tokenizer.spaces` says of the
    space before a text what the standard's key cannot, and where the two disagree that key counts.
    """
    tokens, types, scores = (_array(metadata, name, where) for name in ("tokens", "token_type", "scores"))
    if not len(tokens) == len(types) == len(scores):
        raise TokenizerError("has not one score and one type for each token", where=where)
    form = str(metadata.get(EXTRA + "spaces", spm.PREPEND))
    if not metadata.get(GGML + "add_space_prefix", True):
        form = spm.NEVER
    elif form not in (spm.PREPEND, *spm.METASPACE):
        form = spm.PREPEND
    scored = {t: s for t, kind, s in zip(tokens, types, scores, strict=True) if kind in (NORMAL, BYTE)}
    around = {"post_processor": _post_processor(metadata), **spm.around(form)}
    merges = spm.pairs_by_score(scored, where)
    return _from_parts(metadata, around, merges, {"byte_fallback": True, "fuse_unk": True}, where)


BUILDERS = {BYTE_LEVEL.model: _of_steps, SENTENCEPIECE.model: _of_scores}


def _from_parts(
    metadata: Mapping[str, Any],
    around: Mapping[str, Any],
    merges: Sequence[tuple[str, str]],
    model: Mapping[str, Any],
    where: object,
) -> Tokenizer:
    tokens, types = (_array(metadata, name, where) for name in ("tokens", "token_type"))
    if len(tokens) != len(types):
        raise TokenizerError("has not one token type for each token", where=where)
    added = {i: tokens[i] for i, kind in enumerate(types) if kind in ADDED}
    normal = [i for i, kind in enumerate(types) if kind not in (*ADDED, UNUSED)]
    # Added tokens behind the model's own get the ids from there on, in order; those among them are also
    # in the model. A file with gaps has them all in the model.
    inside = [i for i in added if normal and i < normal[-1]]
    for members in (inside, added):
        vocab = {tokens[i]: i for i in sorted([*normal, *members])}
        made = build_tokenizer(around, vocab, merges, model, _added(metadata, added, types), where)
        with guarded("look up an added token", where):
            same = all(made.token_to_id(content) == i for i, content in added.items())
        if same:
            return made
    raise TokenizerError("has added tokens whose ids cannot be rebuilt", where=where)


def _array(metadata: Mapping[str, Any], name: str, where: object) -> list[Any]:
    value = metadata.get(GGML + name)
    if value is None or isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TokenizerError(f"has no {GGML}{name}", where=where, hint="Fetch or convert the file again")
    found, kind = list(value), ITEMS[name]
    if not all(isinstance(item, kind) for item in found):
        raise TokenizerError(
            f"has {GGML}{name} of another kind than {kind.__name__}",
            where=where,
            hint="Fetch or convert the file again",
        )
    return found


def _added(metadata: Mapping[str, Any], added: Mapping[int, str], types: list[Any]) -> list[dict[str, Any]]:
    flagged = {flag: _ids(metadata, f"{EXTRA}added.{flag}") for flag in FLAGS}
    return [
        {"content": content, "special": types[i] in (CONTROL, UNKNOWN)}
        | {flag: i in flagged[flag] for flag in FLAGS}
        for i, content in added.items()
    ]


def _ids(metadata: Mapping[str, Any], key: str) -> set[int]:
    """The ids in an array; empty where the key is of another kind."""
    value = metadata.get(key)
    return {i for i in value if isinstance(i, int)} if isinstance(value, list) else set()


def _around(metadata: Mapping[str, Any], spec: PreTokenizer) -> dict[str, Any]:
    """What a tokenizer.json says around its model and its added tokens."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    normalizer = {"nfc": {"type": "NFC"}}.get(str(metadata.get(EXTRA + "normalizer")))
    return {
        "normalizer": normalizer,
        "pre_tokenizer": to_json(spec),
        "post_processor": _post_processor(metadata) or byte_level,
        "decoder": byte_level,
    }


def _post_processor(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """A template that adds BOS and EOS where the file says so and has them."""
    text = {"Sequence": {"id": "A", "type_id": 0}}
    around: dict[str, list[dict[str, Any]]] = {"bos": [], "eos": []}
    known = {}
    for name, pieces in around.items():
        i = metadata.get(ID_KEYS[name])
        if metadata.get(f"{GGML}add_{name}_token") and isinstance(i, int):
            pieces.append({"SpecialToken": {"id": name, "type_id": 0}})
            known[name] = {"id": name, "ids": [i], "tokens": [name]}
    if not known:
        return None
    single = [*around["bos"], text, *around["eos"]]
    pair = [*single, *around["bos"], {"Sequence": {"id": "B", "type_id": 1}}, *around["eos"]]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}
