"""The Modelfile's TEMPLATE in Go's own template engine, against the model's chat template in jinja.

    python benchmarks/ollama_template.py MODEL...        (needs the program `go`)

Each MODEL is what `dsconvert gguf` takes. Its TEMPLATE is run as Ollama runs one that names .Messages
(template/template.go): on a map with System and Messages, whose elements have Role and Content.
Conversations of one to seven messages, with and without a system message, must come out as the jinja writes
them, less BOS where llama.cpp puts it before the prompt.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from converters.gguf.modelfile import template_lines, turns_of
from dsconvert.checkpoints.checkpoint import open_checkpoint
from dsconvert.vision.plan import plan_towers, with_template
from tokenizer_tools import chat_template
from tokenizer_tools.load import TokenizerData, load_tokenizer

PROGRAM = r"""
package main

import (
	"encoding/json"
	"os"
	"text/template"
)

type Message struct{ Role, Content string }

type Request struct {
	Template string
	Talks    [][]*Message
}

func main() {
	var r Request
	if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
		panic(err)
	}
	funcs := template.FuncMap{"json": func(v any) string { b, _ := json.Marshal(v); return string(b) }}
	t := template.Must(template.New("").Option("missingkey=zero").Funcs(funcs).Parse(r.Template))
	out := []string{}
	for _, talk := range r.Talks {
		var b stringWriter
		system := ""
		for _, m := range talk {
			if m.Role == "system" {
				system = m.Content
			}
		}
		values := map[string]any{"System": system, "Messages": talk, "Response": ""}
		if err := t.Execute(&b, values); err != nil {
			panic(err)
		}
		out = append(out, string(b))
	}
	json.NewEncoder(os.Stdout).Encode(out)
}

type stringWriter []byte

func (w *stringWriter) Write(p []byte) (int, error) { *w = append(*w, p...); return len(p), nil }
"""
CONTENTS = ("Hello", 'quotes "x" and \\n `y`', "{{ .Role }} {% if %}", "\u4f60\u597d\n\nnew line", "a" * 500)


def talks(system: bool) -> list[list[dict[str, str]]]:
    """Conversations that end with a question."""
    first = [{"role": "system", "content": "Be brief."}] if system else []
    roles = ("user", "assistant")
    turns = [{"role": roles[n % 2], "content": CONTENTS[n % len(CONTENTS)]} for n in range(7)]
    return [[*first, *turns[:count]] for count in (1, 3, 5, 7)]


def tokenizer_of(model: str) -> TokenizerData:
    """A checkpoint's tokenizer with the template that its GGUF file gets."""
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.config.vocab_size)
    towers = plan_towers(checkpoint, checkpoint.config, tokenizer)
    return tokenizer if towers is None else with_template(tokenizer, towers)


def in_go(template: str, asked: list[list[dict[str, str]]]) -> list[str]:
    """What Go's engine makes of the conversations."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "main.go"
        source.write_text(PROGRAM, "utf-8")
        given = {
            "Template": template,
            "Talks": [[{k.title(): v for k, v in m.items()} for m in t] for t in asked],
        }
        done = subprocess.run(
            ["go", "run", str(source)], input=json.dumps(given), capture_output=True, text=True, check=True
        )
    found: list[str] = json.loads(done.stdout)
    return found


def main(models: list[str]) -> None:
    failed = 0
    for model in models:
        tokenizer = tokenizer_of(model)
        turns = turns_of(tokenizer)
        if turns is None:
            print(f"{model}: no TEMPLATE is written")
            continue
        names = {
            f"{n}_token": tokenizer.tokens[tokenizer.special[n]]
            for n in ("bos", "eos")
            if n in tokenizer.special
        }
        asked = talks(system=False) + (talks(system=True) if "system" in turns.before else [])
        wanted = [chat_template.render(tokenizer.chat.default, talk, **names) for talk in asked]
        if tokenizer.add_bos:
            wanted = [text.removeprefix(names["bos_token"]) for text in wanted]
        template = "\n".join(template_lines(turns)).removeprefix('TEMPLATE """').removesuffix('"""')
        same = [a == b for a, b in zip(in_go(template, asked), wanted, strict=True)]
        print(f"{model}: {sum(same)} of {len(same)} conversations the same")
        failed += not all(same)
    sys.exit(failed)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1:])
