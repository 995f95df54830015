"""--json has one meaning: events and results as JSON lines, in a file or on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dsconvert.cli import cli


def command(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("json") / "a.gguf"
    assert command("gguf", "sample:", "-q", "q8_0", "--out", out, "--effort", "off").exit_code == 0
    return out


def timeless(event: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in event.items() if key not in ("seconds", "outputs", "path")}


def test_a_conversion_writes_the_same_lines_to_a_file_as_to_standard_output(tmp_path: Path) -> None:
    ask = ("gguf", "sample:", "-q", "q8_0", "--effort", "off", "--threads", 1)
    file = tmp_path / "events.jsonl"
    beside = command(*ask, "-o", tmp_path / "a.gguf", "--json", file)
    assert beside.exit_code == 0, beside.output
    assert "wrote" in beside.stdout  # the text is shown as ever
    instead = command(*ask, "--json", "-o", tmp_path / "b.gguf")
    assert instead.exit_code == 0, instead.output
    saved, printed = lines(file.read_text("utf-8")), lines(instead.stdout)
    assert [timeless(event) for event in saved] == [timeless(event) for event in printed]
    assert {"planned", "tensordone", "finished"} <= {event["event"] for event in saved}


@pytest.mark.parametrize("name", ["inspect", "tokenizer"])
def test_a_result_is_the_same_line_wherever_it_goes(name: str, converted: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    for _ in range(2):  # the second replaces what the first wrote
        assert command(name, converted, "--json", file).exit_code == 0
    assert file.read_text("utf-8") == command(name, converted, "--json").stdout
    assert command(name, converted, "--json", "-").stdout == command(name, converted, "--json").stdout
    assert len(lines(file.read_text("utf-8"))) == 1


def test_an_error_is_in_the_file_too(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    result = command("inspect", tmp_path / "none.gguf", "--json", file)
    assert result.exit_code == 2
    (error,) = lines(file.read_text("utf-8"))
    assert (error["event"], error["kind"]) == ("error", "CheckpointError")
    assert error["what"] in result.stderr
    assert str(tmp_path / "none.gguf") == error["where"]


@pytest.mark.parametrize("content", ["{}", '{"title": 1}', "text", "[1]"])
def test_a_file_of_others_is_not_replaced(content: str, converted: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content, "utf-8")
    result = command("inspect", converted, "--json", file)
    assert result.exit_code == 2
    assert "is not JSON of dsconvert" in result.stderr
    assert file.read_text("utf-8") == content


def test_an_argument_after_a_bare_json_is_not_taken_for_its_file(converted: Path) -> None:
    before = converted.read_bytes()
    result = command("inspect", "--json", converted)
    assert result.exit_code == 2
    assert "for standard output write `--json -`" in result.stderr
    assert converted.read_bytes() == before


def test_the_output_and_the_json_are_two_files(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    result = command("gguf", "sample:", "-o", file, "--json", file)
    assert result.exit_code == 2
    assert "is named for two outputs" in result.stderr
    assert not list(tmp_path.iterdir())


def test_quiet_shows_no_result(converted: Path) -> None:
    for name in ("inspect", "tokenizer"):
        result = command(name, converted, "--quiet")
        assert (result.exit_code, result.output) == (0, "")


def test_former_spellings_work(converted: Path, tmp_path: Path) -> None:
    text = tmp_path / "lines.txt"
    text.write_text("a line\n", "utf-8")
    ask = ("tokenizer", converted, "--compare", "sample:", "--strings", 0, "--json")
    counts = [lines(command(*ask, *more).stdout)[0]["comparison"]["texts"] for more in ((), ("--text", text))]
    assert counts[1] == counts[0] + 1
    unknown = command("verify", converted, "--against", "sample:", "--effort", "off")
    assert unknown.exit_code == 2
    assert "'quick', 'full'" in unknown.stderr
