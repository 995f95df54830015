"""The import rules of the architecture: who may import whom, and what must stay lazy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dsconvert", "converters", "tokenizer_tools")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
HEAVY = ("torch", "transformers", "numba", "tokenizers", "rich", "gguf", "huggingface_hub", "numpy")
LINES = 320


GROUND = (
    "dsconvert.__version__",
    "dsconvert.compile",
    "dsconvert.errors",
    "dsconvert.events",
    "dsconvert.libraries",
    "dsconvert.machine",
    "dsconvert.network",
    "dsconvert.reading",
)
# Each package, or module beside them, and what it may import besides GROUND and itself.
TABLE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(GROUND, ()),
    "dsconvert.streams": (),
    "dsconvert.models": (),
    "dsconvert.checkpoints": ("dsconvert.models",),
    "dsconvert.texts": (),
    "dsconvert.calibration": ("dsconvert.texts",),
    "dsconvert.decoder": ("dsconvert.models",),
    "dsconvert.vision": ("dsconvert.models", "dsconvert.checkpoints", "dsconvert.decoder", "tokenizer_tools"),
    "dsconvert.quantization": (
        "dsconvert.models",
        "dsconvert.checkpoints",
        "dsconvert.decoder",
        "dsconvert.vision",
        "dsconvert.calibration",
        "dsconvert.proof",
        "tokenizer_tools",
    ),
    "dsconvert.runtimes": (),
    "dsconvert.memory": ("dsconvert.models", "dsconvert.runtimes"),
    "dsconvert.proof": (
        "dsconvert.models",
        "dsconvert.checkpoints",
        "dsconvert.texts",
        "dsconvert.calibration",
        "dsconvert.decoder",
        "dsconvert.runtimes",
        "tokenizer_tools",
    ),
    "dsconvert.report": ("dsconvert.proof",),
    "dsconvert.chat": ("dsconvert.models", "dsconvert.decoder", "dsconvert.runtimes", "tokenizer_tools"),
    "tokenizer_tools": (),
}
ALL = ("dsconvert", "converters", "tokenizer_tools")
FACE = ("dsconvert.cli", "dsconvert.__main__", "dsconvert.commands", "dsconvert.console")
NOT_BELOW = ("dsconvert.report", "dsconvert.chat", "dsconvert.streams")
BEFORE_REPORT = tuple(name for name in TABLE if name not in NOT_BELOW)
TABLE |= dict.fromkeys(FACE, ALL)
FORMATS = ("converters.gguf", "converters.gptq", "converters.compressed", "converters.exl2", "converters.mlx")
TABLE |= dict.fromkeys(FORMATS, BEFORE_REPORT)
TABLE |= dict.fromkeys(("converters.outputs", "converters.folder_sizes"), (*BEFORE_REPORT, *FORMATS))
TABLE["converters.sizes"] = (*BEFORE_REPORT, *FORMATS, "converters.folder_sizes")
# What does not keep the table yet: (module, what it imports) -> why.
EXCEPTIONS: dict[tuple[str, str], str] = {}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[str]:
    """Every module that the file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def package_of(module: str) -> str | None:
    """The line of the table that a module falls under, the longest; None for one that no line names."""
    return max((name for name in TABLE if within(module, name)), key=len, default=None)


def forbidden(module: str, imported: str) -> bool:
    """Whether the table forbids this import; of an import's two readings, `a` and `a.b`, both are asked."""
    if module in ALL or imported in ALL or not any(within(imported, name) for name in ALL):
        return False
    own = package_of(module)
    if own is None:
        return True
    allowed = (own, "dsconvert.errors", "dsconvert.reading") if own == "tokenizer_tools" else (own, *GROUND)
    return not any(within(imported, name) for name in (*allowed, *TABLE[own]))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path: Path) -> None:
    module = name_of(path)
    assert module in ALL or package_of(module), f"no line of the table names {module}"
    wrong = {imported for imported in imports(path) if forbidden(module, imported)}
    wrong -= {
        imported for imported in wrong if any(m == module and within(imported, i) for m, i in EXCEPTIONS)
    }
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_exceptions_are_still_needed() -> None:
    for (module, imported), why in EXCEPTIONS.items():
        path = next((path for path in MODULES if name_of(path) == module), None)
        assert why
        assert path is not None, f"{module} is gone"
        assert imported in imports(path), f"{module} imports {imported} no more: take it out of EXCEPTIONS"
        assert forbidden(module, imported), f"the table allows {imported} to {module}"


def test_packages_form_no_circle() -> None:
    """Each package of the table stands above all that it may import."""
    done: set[str] = set()
    todo = {name: {other for other in may if other in TABLE} for name, may in TABLE.items()}
    while ready := [name for name, may in todo.items() if may <= done]:
        done |= set(ready)
        todo = {name: may for name, may in todo.items() if name not in done}
    assert not todo, f"these stand in a circle: {sorted(todo)}"


def test_the_page_on_the_architecture_shows_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| .* \|(.*)\|$", page, re.MULTILINE))
    shown = {name: {word.strip() for word in may.split(",")} - {""} for name, may in rows.items()}
    packages = {name for name in TABLE if name.startswith(("dsconvert.", "tokenizer"))} - {*GROUND, *FACE}
    assert shown == {
        name: {other.removeprefix("dsconvert.") for other in TABLE[name]}
        for name in packages - {"dsconvert.streams"}
    }


def test_the_page_on_architectures_shows_a_real_file_and_every_field() -> None:
    page = (ROOT / "docs" / "add-an-architecture.md").read_text(encoding="utf-8")
    folder = ROOT / "dsconvert" / "models"
    assert page.split("```python\n")[1].split("```")[0] == (folder / "architectures" / "qwen3.py").read_text(
        "utf-8"
    )
    source = (
        (folder / "architecture.py").read_text("utf-8").split("class Architecture:")[1].split("@property")[0]
    )
    fields = set(re.findall(r"^    (\w+): ", source, re.MULTILINE))
    assert fields == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))


def test_the_page_on_types_shows_a_real_change() -> None:
    """Every file of the page's diff has its lines, those of a hunk in one piece."""
    page = (ROOT / "docs" / "add-a-quant-type.md").read_text(encoding="utf-8")
    diff = page.split("```diff\n")[1].split("```")[0]
    files = re.split(r"^\+\+\+ b/(.*)\n", diff, flags=re.MULTILINE)[1:]
    shown = dict(zip(files[::2], files[1::2], strict=True))
    assert len(shown) >= 4
    for name, text in shown.items():
        source = (ROOT / name).read_text(encoding="utf-8")
        hunks = re.split(r"^@@.*\n", text.split("\n--- ")[0], flags=re.MULTILINE)[1:]
        assert hunks, name
        for hunk in hunks:
            kept = "\n".join(line[1:] for line in hunk.splitlines() if not line.startswith("-"))
            assert kept in source, (name, kept)


def test_the_page_on_the_architecture_prints_the_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    code = page.split('python -c "', 1)[1].split('\n"\n', 1)[0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    found = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert set(TABLE) - {"dsconvert.__version__"} <= {*found, "dsconvert.__main__"}
    assert found["converters.outputs"] >= set(FORMATS)
    excepted = {imported for _, imported in EXCEPTIONS}
    for name, imported in found.items():
        for other in imported:
            assert not forbidden(name, other) or any(one.startswith(other) for one in excepted), (name, other)


# Who may name a type that weights are stored in: who reads folders of weights, and who packs a format's own.
STORAGE = (
    "dsconvert.checkpoints",
    "dsconvert.models.weights",
    "converters.gguf.kernels",
    "converters.gptq.pack",
    "converters.compressed.pack",
    "converters.compressed.unpack",
    "converters.exl2.pack",
    "converters.mlx.pack",
    "dsconvert.quantization.bit_stream",
)


def stored_types(source: str) -> set[str]:
    """What a module says of how weights are stored: numpy's 16-bit types, readable types, a tensor's data."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found |= {f"{node.value.id}.{node.attr}"} & {"np.uint16", "np.float16"}
        if isinstance(node, ast.alias):
            found |= {node.name} & {"READABLE", "plain"}
        if isinstance(node, ast.Attribute) and node.attr == "data":
            owner = ast.unparse(node.value)
            found |= {f"{owner}.data"} if ".tensors[" in owner or owner in ("stored", "tensor") else set()
    return found


def test_no_module_but_the_readers_knows_how_a_weight_is_stored() -> None:
    """Kernels, proofs and solvers read rows of bf16 or float32, and convert no other type."""
    for path in MODULES:
        if not any(within(name_of(path), name) for name in STORAGE):
            assert not stored_types(path.read_text(encoding="utf-8")), name_of(path)


@pytest.mark.parametrize(
    "source",
    [
        "x = raw.dtype == np.uint16",
        "x = y.astype(np.float16)",
        "from dsconvert.checkpoints.safetensors_reader import READABLE",
        "x = checkpoint.tensors[name].data[a:b]",
        "x = stored.data",
    ],
)
def test_a_module_that_knows_how_a_weight_is_stored_is_found(source: str) -> None:
    assert stored_types(source)


def test_the_rules_can_fail() -> None:
    assert forbidden("dsconvert.proof.compare", "converters.gguf.as_model")
    assert forbidden("dsconvert.proof.compare", "dsconvert.vision.config")
    assert forbidden("dsconvert.models.config", "dsconvert.checkpoints.checkpoint")
    assert forbidden("dsconvert.texts.sets", "tokenizer_tools.load")
    assert forbidden("dsconvert.proof.figures", "dsconvert.quantization.run_state")
    assert forbidden("dsconvert.errors", "dsconvert.models.config")
    assert forbidden("dsconvert.somewhere_new", "dsconvert.models.config")
    assert forbidden("converters.gguf.convert", "dsconvert.commands.verify")
    assert forbidden("converters.gguf.convert", "dsconvert.report.page")
    assert forbidden("converters.outputs", "dsconvert.chat.session")
    assert forbidden("dsconvert.chat.session", "dsconvert.streams")
    assert forbidden("converters.gguf.convert", "converters.gptq.pack")
    assert forbidden("converters.gguf.convert", "converters.outputs")
    assert forbidden("tokenizer_tools.load", "dsconvert.checkpoints.checkpoint")
    assert forbidden("tokenizer_tools.load", "dsconvert.machine")
    assert not forbidden("converters.gguf.convert", "converters.gguf.mixtures")
    assert not forbidden("converters.outputs", "converters.gptq.reader")
    assert not forbidden("dsconvert.proof.compare", "dsconvert.decoder.torch_decoder")
    assert not forbidden("dsconvert.commands.verify", "converters.outputs")
    assert not forbidden("dsconvert.models.config", "numpy.typing")


# An architecture's names: classes, model types and GGUF names alike. What sounds like one and is none:
# programs and their functions and files, RoPE's type, a kind of models.
ARCHITECTURE = re.compile(r"(?i)llama|mistral|mixtral|qwen|multi_?modality|deepseek_?v\w+|\w+ForCausalLM")
NO_ARCHITECTURE = re.compile(
    r"(?i)llama\.?cpp|llama\.h|llama_(cpp|h|tensor_get_type|batch)\b|exllama\w*|ollama|llama[ _]?3\b"
    r"|llama-(layout|quant\w*|imatrix|perplexity|ggml-to-gguf|mtmd-cli)|convert_llama_weights_to_hf"
)
# Packages that serve one model, the towers of DeepSeek-VL, or name functions of llama.h, or tokenizers.
OF_ONE_MODEL = ("dsconvert.vision", "converters.gguf.projector")
OTHER_NAMES = ("dsconvert.runtimes", "tokenizer_tools", "dsconvert.models.architectures")


def architectures_named(module: str, text: str) -> set[str]:
    """The names of architectures in the text of a module that should have none."""
    if any(within(module, name) for name in OTHER_NAMES):
        return set()
    found = set(ARCHITECTURE.findall(NO_ARCHITECTURE.sub("", text)))
    own = any(within(module, name) for name in OF_ONE_MODEL)
    return {name for name in found if not (own and name.lower().startswith("deepseek"))}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_its_file_names_an_architecture(path: Path) -> None:
    assert not architectures_named(name_of(path), path.read_text(encoding="utf-8"))


def test_a_name_of_an_architecture_is_found() -> None:
    for text in ("LLAMA", "'qwen2'", "Qwen3DecoderLayer", "MistralConfig", "FooForCausalLM", "deepseek_vl"):
        assert architectures_named("dsconvert.decoder.torch_decoder", f"x = {text}"), text
    for text in ("llama.cpp's", "exllamav2", "llama-quantize", '"llama3"', "deepseek-llm-7b"):
        assert not architectures_named("dsconvert.decoder.torch_decoder", text), text
    assert not architectures_named("dsconvert.vision.config", "DeepseekVLModel")
    assert architectures_named("dsconvert.vision.config", "LlamaModel")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_the_console_prints(path: Path) -> None:
    calls = [
        node.lineno
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert name_of(path) == "dsconvert.console" or not calls, f"print() in lines {calls}"


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(*sorted(m for m in {HEAVY} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import dsconvert.cli, click.testing\nclick.testing.CliRunner().invoke(dsconvert.cli.cli, ['--help'])"
    )
    assert loaded_after(code) == set()


def test_gguf_path_loads_no_torch() -> None:
    loaded = loaded_after("import converters.gguf.convert")
    assert not loaded & {"torch", "transformers", "numba"}
