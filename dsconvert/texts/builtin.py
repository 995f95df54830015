"""The built-in text: what every CPython carries, and a page of Chinese of our own.

Three kinds of documents: `topics/...` (the language reference that `pydoc` shows), `stdlib/...` (sources of
the standard library) and `chinese/...`. The two parts share no document, on no version of Python, because a
document's name alone decides; the texts themselves differ a little between versions, so that figures
measured on them are comparable only within one.
"""

from __future__ import annotations

import hashlib
import os
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import Literal

from dsconvert.errors import ConversionError, UsageError

Part = Literal["calibration", "evaluation"]
Kind = Literal["topics", "stdlib", "chinese"]

# Topics that are pages cut out of a bigger topic; with both, the two parts would share text.
NESTED_TOPICS = """
    async attribute-access augassign callable-types class context-managers continue customization
    dynamic-features else exceptions for function id-classes if in naming numeric-types sequence-types try
    typesseq-mutable while with
"""
# Sources with much prose in comments and docstrings and without big tables, as patterns under the library.
STDLIB = """
    _collections_abc.py _pydecimal.py argparse.py ast.py asyncio/*.py base64.py bdb.py bisect.py
    calendar.py cmd.py code.py codecs.py collections/*.py concurrent/futures/*.py configparser.py
    contextlib.py copy.py csv.py dataclasses.py datetime.py difflib.py dis.py doctest.py email/*.py
    enum.py filecmp.py fileinput.py fractions.py ftplib.py functools.py gettext.py glob.py graphlib.py
    gzip.py hashlib.py heapq.py html/parser.py http/*.py imaplib.py importlib/*.py inspect.py ipaddress.py
    json/*.py logging/*.py mailbox.py mimetypes.py modulefinder.py multiprocessing/*.py ntpath.py
    numbers.py operator.py optparse.py os.py pathlib.py pdb.py pickle.py pickletools.py pkgutil.py
    platform.py plistlib.py poplib.py posixpath.py pprint.py profile.py pstats.py pydoc.py queue.py
    random.py re/_parser.py runpy.py sched.py selectors.py shelve.py shlex.py shutil.py smtplib.py
    socket.py socketserver.py ssl.py statistics.py string.py subprocess.py tarfile.py tempfile.py
    textwrap.py threading.py timeit.py tokenize.py trace.py traceback.py tracemalloc.py turtle.py types.py
    typing.py unittest/*.py urllib/*.py uuid.py warnings.py wave.py weakref.py webbrowser.py wsgiref/*.py
    xml/dom/*.py xml/etree/*.py xmlrpc/*.py zoneinfo/*.py
"""
# Chosen once, so that each part gets prose, code and Chinese in about the same shares.
SALT = "126"


@dataclass(frozen=True)
class Document:
    """A text with its name, `kind/...`, always with forward slashes."""

    name: str
    text: str

    @property
    def part(self) -> Part:
        """The part that the document belongs to; see `part_of`."""
        return part_of(self.name)


def part_of(name: str) -> Part:
    """The part of the document called `name`: about one name in five is for evaluation, by its SHA-256."""
    return "evaluation" if hashlib.sha256(f"{SALT}/{name}".encode()).digest()[0] < 51 else "calibration"


@cache
def _all_documents() -> tuple[Document, ...]:
    documents = sorted((*_topics(), *_stdlib(), *_chinese()), key=lambda document: document.name)
    if not any(document.name.startswith(("topics/", "stdlib/")) for document in documents):
        raise ConversionError(
            "this Python carries neither pydoc_data nor the sources of its library",
            where=Path(os.__file__).parent,
            why="the built-in text is made of them",
            hint="Give a text file of your own, or install the complete Python",
        )
    return tuple(documents)


def builtin_documents(part: Part) -> list[Document]:
    """The documents of one part, sorted by name.

    Raises ConversionError where this Python carries no text at all.
    """
    return [document for document in _all_documents() if document.part == part]


def evaluation_pages(count: int, chars: int, kind: Kind = "topics") -> list[str]:
    """`count` pages of `chars` characters each from the evaluation part's documents of `kind`, in order.

    The pages do not overlap and are spread evenly, so that a few of them meet many documents.
    Raises UsageError when there is too little text, ConversionError where there is none.
    """
    texts = [d.text for d in builtin_documents("evaluation") if d.name.startswith(kind + "/")]
    whole = "\n".join(texts)
    if count < 1 or chars < 1 or count * chars > len(whole):
        raise UsageError(
            f"{count} pages of {chars} characters do not fit into the built-in evaluation text",
            why=f"{kind} holds {len(whole)} characters",
            hint="Ask for fewer or shorter pages, or give a text file of your own",
        )
    stride = len(whole) // count
    return [whole[i * stride : i * stride + chars] for i in range(count)]


def evaluation_page(chars: int) -> str:
    """One page of `chars` characters of evaluation text: three quarters prose, then code, a little Chinese.

    Raises UsageError when there is too little text, ConversionError where there is none.
    """
    chinese = min(chars // 40, 200)
    code = chars // 4 - chinese
    shares: tuple[tuple[Kind, int], ...] = (
        ("topics", chars - code - chinese),
        ("stdlib", code),
        ("chinese", chinese),
    )
    return "".join(evaluation_pages(1, share, kind)[0] for kind, share in shares if share)


def _topics() -> Iterator[Document]:
    """The reference topics; some distributions leave them out."""
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:
        return
    nested = frozenset(NESTED_TOPICS.split())
    for name, text in topics.items():
        if name not in nested:
            yield Document(f"topics/{name}", text.strip() + "\n")


def _stdlib() -> Iterator[Document]:
    """The sources that this version has; empty files and files that cannot be read are left out."""
    root = Path(os.__file__).parent
    for pattern in STDLIB.split():
        for path in root.glob(pattern):
            try:
                with tokenize.open(path) as file:
                    text = file.read()
            except (OSError, SyntaxError, UnicodeDecodeError):
                continue
            if text.strip():
                yield Document(f"stdlib/{path.relative_to(root).as_posix()}", text)


def _chinese() -> Iterator[Document]:
    """The page of Chinese that ships with the sample: sections under `# name` lines."""
    page = (resources.files("dsconvert") / "sample" / "chinese.txt").read_text(encoding="utf-8")
    for section in page.split("# ")[1:]:
        name, text = section.split("\n", 1)
        yield Document(f"chinese/{name}", text.strip() + "\n")
