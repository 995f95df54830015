"""The workflows for GitHub: what they call exists, what they state is used, and their scripts do it."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from dsconvert.cli import cli

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".github" / "workflows"
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.yml"))}
PAGE = (ROOT / "docs" / "ci.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
CALLED = re.compile(r"(?:\.|OWNER/dsconvert)/\.github/workflows/([\w-]+\.yml)(?:@v\d+\.\d+\.\d+)?")
KNOWN = {"runs-on", "steps", "uses", "with", "needs", "if", "env", "permissions", "strategy"}


def parsed(text: str) -> dict[str, Any]:
    """A workflow; YAML 1.1 reads its key `on` as true."""
    found = yaml.safe_load(text)
    return {"on" if key is True else key: value for key, value in found.items()}


def declared(workflow: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a workflow that others call; none of another one."""
    on = workflow["on"]
    return (on["workflow_call"] or {}).get("inputs", {}) if "workflow_call" in on else {}


def steps_of(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield from job.get("steps", [])


def faults(text: str) -> Iterator[str]:
    """What GitHub would refuse in a workflow, or what would not do what it says."""
    workflow = parsed(text)
    if not {"name", "on", "jobs"} <= set(workflow) or not workflow["jobs"]:
        yield "a workflow has a name, events and jobs"
        return
    inputs = declared(workflow)
    used = set(re.findall(r"\binputs\.([\w-]+)", text))
    yield from (f"input {name} is not declared" for name in used - set(inputs))
    yield from (f"input {name} is not used" for name in set(inputs) - used)
    for name, stated in inputs.items():
        if stated.get("type") not in ("string", "boolean", "number"):
            yield f"input {name} has no type"
        if ("default" in stated) == stated.get("required", False):
            yield f"input {name} is required or has a default"
    for name, job in workflow["jobs"].items():
        yield from (f"job {name} has a key {key}" for key in set(job) - KNOWN)
        yield from faults_of_call(name, job) if "uses" in job else faults_of_steps(name, job)


def faults_of_call(name: str, job: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a job that calls a workflow of ours."""
    called = CALLED.fullmatch(job["uses"])
    if called is None or called[1] not in FILES:
        yield f"job {name} calls {job['uses']}"
        return
    inputs, given = declared(parsed(FILES[called[1]])), job.get("with", {})
    yield from (f"job {name} gives {key}" for key in set(given) - set(inputs))
    required = {key for key, stated in inputs.items() if stated.get("required")}
    yield from (f"job {name} does not give {key}" for key in required - set(given))
    yield from (f"{key} is no text" for key, value in given.items() if not isinstance(value, str))


def faults_of_steps(name: str, job: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the steps of a job: actions without a version, scripts, commands, options."""
    if "runs-on" not in job or not job.get("steps"):
        yield f"job {name} runs nothing anywhere"
    for step in job.get("steps", []):
        if ("run" in step) == ("uses" in step):
            yield f"a step of {name} runs or uses something"
        if "uses" in step and not re.fullmatch(r"[\w.-]+/[\w.-]+@v\d+", step["uses"]):
            yield f"{step['uses']} has no version"
        script = step.get("run", "")
        if "${{" in script:
            yield f"a script of {name} holds an expression, which is no safe way to give it a text"
        checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        if checked.returncode:
            yield f"a script of {name}: {checked.stderr}"
        for variable in set(re.findall(r"\$\{?([A-Z][A-Z0-9_]*)", script)) - set(step.get("env", {})):
            yield f"a script of {name} reads {variable}, which nothing sets"
        yield from faults_of_commands(script)


def faults_of_commands(script: str) -> Iterator[str]:
    """What a script asks of dsconvert that this has not."""
    for name, words in re.findall(r"(?:^|\s)dsconvert (\w+) (.*)$", script, re.MULTILINE):
        command = cli.get_command(click.Context(cli), name)
        if command is None:
            yield f"there is no command {name}"
            continue
        known = {spelling for parameter in command.params for spelling in parameter.opts}
        inside = re.findall(r"options\+=\((--[\w-]+)", script)
        yield from (f"{name} has no {o}" for o in {*re.findall(r"--[\w-]+", words), *inside} - known)


@pytest.mark.parametrize("name", FILES)
def test_a_workflow_is_sound(name: str) -> None:
    assert list(faults(FILES[name])) == []


def test_the_workflow_on_the_page_is_sound_and_calls_ours() -> None:
    (shown,) = SHOWN
    assert list(faults(shown)) == []
    assert [job["uses"] for job in parsed(shown)["jobs"].values()]
    for name in declared(parsed(FILES["convert.yml"])):
        assert f"`{name}`" in PAGE


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("inputs.quant", "inputs.qunat", "input qunat is not declared"),
        ("        required: true\n", "", "input model is required or has a default"),
        ("--quant", "--quants", "gguf has no --quants"),
        ("(--max-kld", "(--max-kl", "verify has no --max-kl"),
        ("dsconvert verify", "dsconvert verfy", "there is no command verfy"),
        ("@v5", "", "actions/setup-python has no version"),
        ("          MIN_TOP1: ${{ inputs.min-top1 }}\n", "", "reads MIN_TOP1"),
        ('"$MODEL" --quant', "${{ inputs.model }} --quant", "holds an expression"),
        ("; fi\n", "\n", "syntax error"),
        ("    runs-on: ubuntu-latest\n", "", "runs nothing anywhere"),
    ],
)  # fmt: skip
def test_a_fault_of_a_workflow_is_found(old: str, new: str, fault: str) -> None:
    text = FILES["convert.yml"]
    assert old in text
    assert any(fault in found for found in faults(text.replace(old, new, 1)))


def test_a_call_with_another_input_is_found() -> None:
    workflow = parsed(FILES["ci.yml"])
    for change, fault in (
        ({"modle": "sample:"}, "gives modle"),
        ({"max-kld": 0.1}, "max-kld is no text"),
    ):
        changed = copy.deepcopy(workflow)
        changed["jobs"]["sample"]["with"] |= change
        assert any(fault in found for found in faults(yaml.safe_dump(changed)))
    del workflow["jobs"]["sample"]["with"]["model"]
    assert any("does not give model" in found for found in faults(yaml.safe_dump(workflow)))


def value(text: str, given: dict[str, str]) -> str:
    """What `${{ inputs.NAME }}` stands for."""
    return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], text)


def play(folder: Path, **given: str) -> int:
    """Run the scripts of convert.yml in turn, as GitHub does, but for the installation."""
    workflow = parsed(FILES["convert.yml"])
    inputs = {name: stated.get("default", "") for name, stated in declared(workflow).items()} | given
    program = folder / "bin" / "dsconvert"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dsconvert "$@"\n')
    program.chmod(0o755)
    base = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for step in steps_of(workflow):
        if "run" in step and step["name"] != "Install":
            own = {name: value(text, inputs) for name, text in step.get("env", {}).items()}
            words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
            done = subprocess.run(words, cwd=folder, env=base | own, capture_output=True, check=False)
            if done.returncode:
                return done.returncode
    return 0


def test_the_scripts_do_what_our_own_workflow_asks_for(tmp_path: Path) -> None:
    """The sample, by its limits, and in llama.cpp."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs llama.cpp: pip install xllamacpp")
    limits = parsed(FILES["ci.yml"])["jobs"]["sample"]["with"]
    assert play(tmp_path, **limits) == 0
    assert json.loads((tmp_path / "proof.json").read_text(encoding="utf-8"))["passed"] is True
    assert (tmp_path / "proof.html").is_file()


def test_the_scripts_fail_on_a_limit_and_keep_the_proof(tmp_path: Path) -> None:
    assert play(tmp_path, model="sample:", **{"max-kld": "0.000001"}) == 3
    said = json.loads((tmp_path / "proof.json").read_text(encoding="utf-8"))
    assert said["passed"] is False
    assert (tmp_path / "proof.html").is_file()


def test_our_own_workflow_calls_the_one_for_users() -> None:
    jobs = parsed(FILES["ci.yml"])["jobs"]
    assert [CALLED.fullmatch(job["uses"])[1] for job in jobs.values() if "uses" in job] == ["convert.yml"]  # type: ignore[index]
    assert any(step.get("run") == ".ci/run" for step in steps_of(parsed(FILES["ci.yml"])))
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
