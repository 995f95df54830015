"""A conversation without a terminal: prompt, history, ends, characters, a full context, interruptions."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scripted
from scripted import BOS, EOS, EOT, TEMPLATE, UNKNOWN, Scripted

from dsconvert.chat.answer import Answer
from dsconvert.chat.sampling import Sampling
from dsconvert.chat.session import Session
from dsconvert.errors import ConversionError, UsageError

LIKELIEST = Sampling(temperature=0)


def asked(pieces: Generator[str, None, Answer]) -> tuple[list[str], Answer]:
    found = []
    while True:
        try:
            found.append(next(pieces))
        except StopIteration as end:
            return found, end.value


def session(model: Scripted, **settings: Any) -> Session:
    return Session(model, LIKELIEST, **settings)


def text_of(model: Scripted) -> str:
    """What the model has read, specials by name."""
    names = {BOS: "<bos>", EOS: "<eos>", EOT: "<eot>", UNKNOWN: "<?>"}
    raw = b"".join(names[token].encode() if token in names else bytes([token]) for token in model.seen)
    return raw.decode()


def test_a_question_is_written_in_the_template_and_the_answer_ends_at_a_stop() -> None:
    model = scripted.scripted("Hi there.")
    pieces, said = asked(session(model, system="Be brief.").ask("Hello"))
    assert "".join(pieces) == said.text == "Hi there."
    assert said.ended == "stop"
    assert text_of(model) == "<bos>[system]Be brief.<eot>[user]Hello<eot>[assistant]Hi there."
    assert (said.prompt_tokens, said.answer_tokens) == (said.read_tokens, 9)
    assert said.used == len(model.seen)


@pytest.mark.parametrize(
    ("template", "add_bos", "bos", "count"),
    [
        (TEMPLATE, True, BOS, 1),  # both ask for it
        (TEMPLATE, False, BOS, 1),  # the template alone
        (TEMPLATE.replace("{{ bos_token }}", ""), True, BOS, 1),  # the tokenizer alone
        (TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"), True, BOS, 1),
        (TEMPLATE.replace("{{ bos_token }}", ""), False, BOS, 0),
        (TEMPLATE.replace("{{ bos_token }}", ""), True, None, 0),
    ],
)
def test_bos_stands_before_a_prompt_once(template: str, add_bos: bool, bos: int | None, count: int) -> None:
    model = scripted.scripted("x", template=template, add_bos=add_bos, bos=bos)
    asked(session(model).ask("Hello"))
    assert model.seen[:2].count(BOS) == count
    assert model.seen.count(BOS) == count


@pytest.mark.parametrize("stop", [EOS, EOT])
def test_every_end_of_the_list_is_heeded(stop: int) -> None:
    model = scripted.scripted([*b"ab", stop, *b"never"])
    _, said = asked(session(model).ask("Hello"))
    assert (said.text, said.ended, said.answer_tokens) == ("ab", "stop", 2)


def test_a_second_turn_sees_the_first_and_reads_only_what_is_new() -> None:
    model = scripted.scripted("One.", "Two.")
    talk = session(model)
    _, first = asked(talk.ask("First"))
    read = len(model.read_at)
    _, second = asked(talk.ask("Second"))
    assert text_of(model).startswith("<bos>[user]First<eot>[assistant]One.<eot>[user]Second<eot>[assistant]")
    assert second.read_tokens == second.prompt_tokens - first.used
    assert model.read_at[read][0] == first.used
    talk.clear()
    model.script = [[*b"Again.", EOT]]
    asked(talk.ask("First"))
    assert text_of(model) == "<bos>[user]First<eot>[assistant]Again."


def test_a_memory_that_cannot_be_cut_is_read_anew() -> None:
    model = scripted.scripted("One.", "Two.")
    model.keeps = False
    talk = session(model)
    asked(talk.ask("First"))
    talk.clear()
    _, said = asked(talk.ask("Other"))
    assert said.read_tokens == said.prompt_tokens
    assert text_of(model) == "<bos>[user]Other<eot>[assistant]Two."


def test_the_same_question_again_reads_one_token() -> None:
    """Its logits are not kept, and nothing else has to be read."""
    model = scripted.scripted("One.", "Two.")
    talk = session(model)
    asked(talk.ask("First"))
    talk.clear()
    _, said = asked(talk.ask("First"))
    assert (said.text, said.read_tokens) == ("Two.", 1)


def test_characters_come_whole() -> None:
    text = "caf\u00e9 \u4f60\u597d \U0001f600!"
    model = scripted.scripted(text)
    pieces, said = asked(session(model).ask("Hello"))
    assert said.text == text
    assert all(len(piece) == 1 for piece in pieces)
    assert said.answer_tokens == len(text.encode())


def test_an_answer_that_is_cut_inside_a_character_ends_before_it() -> None:
    model = scripted.scripted("a\u4f60\u597d")
    pieces, said = asked(session(model, limit=5).ask("Hello"))
    assert (pieces, said.ended, said.answer_tokens) == (["a", "\u4f60"], "length", 5)


def test_bytes_that_are_no_text_are_marked() -> None:
    model = scripted.scripted([*b"a", 0xFF, *b"b", EOT])
    _, said = asked(session(model).ask("Hello"))
    assert said.text == "a\ufffdb"


def test_white_space_before_an_answer_is_left_out() -> None:
    model = scripted.scripted(" \n Yes. ")
    pieces, said = asked(session(model).ask("Hello"))
    assert "".join(pieces) == said.text == "Yes. "


def test_an_interrupted_answer_stays_in_the_conversation() -> None:
    model = scripted.scripted([*b"abc"], "Go on.")
    talk, count = session(model), iter(range(100))
    pieces, said = asked(talk.ask("Hello", stopped=lambda: next(count) > 3))
    assert said.ended == "interrupted"
    assert "".join(pieces) == said.text
    assert said.text.startswith("ab")
    model.script.pop(0)
    asked(talk.ask("And?"))
    assert text_of(model).startswith(f"<bos>[user]Hello<eot>[assistant]{said.text}<eot>[user]And?<eot>")


def test_a_question_that_is_stopped_before_an_answer_is_as_if_not_asked() -> None:
    model = scripted.scripted("x")
    talk = session(model)
    pieces, said = asked(talk.ask("Hello", stopped=lambda: True))
    assert (pieces, said.text, said.ended, said.used) == ([], "", "interrupted", 0)
    assert talk.messages == ()


def test_the_oldest_turns_go_when_the_context_is_full() -> None:
    model = scripted.scripted(*["x" * 20] * 4, context=200)
    talk = session(model, system="S", limit=30)
    notes = [asked(talk.ask(letter * 30))[1].notes for letter in "abc"]
    assert notes[:2] == [(), ()]
    assert notes[2] == ("the context of 200 tokens is full: the oldest 2 messages were dropped",)
    assert text_of(model).startswith("<bos>[system]S<eot>[user]" + "b" * 30)
    assert text_of(model).endswith("[user]" + "c" * 30 + "<eot>[assistant]" + "x" * 20)
    assert [message.text[0] for message in talk.messages] == ["b", "x", "c", "x"]


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_goes_on() -> None:
    model = scripted.scripted("One.", "Two.", context=100)
    talk = session(model)
    asked(talk.ask("First"))
    with pytest.raises(UsageError, match=r"does not fit: .* it has 1\d\d tokens.*the context has 100"):
        asked(talk.ask("x" * 100))
    assert [message.text for message in talk.messages] == ["First", "One."]
    assert asked(talk.ask("Second"))[1].text == "Two."


def test_an_answer_ends_where_the_context_does() -> None:
    model = scripted.scripted([*b"abc"], context=60)
    _, said = asked(session(model).ask("Hello"))
    assert (said.ended, said.used) == ("context", 60)
    assert said.notes == ("the answer was cut, because the context of 60 tokens is full",)


def test_a_template_without_a_system_message_gets_it_before_the_question() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    model = scripted.scripted("x", "y", template=refusing)
    talk = session(model, system="Be brief.")
    _, said = asked(talk.ask("Hello"))
    assert text_of(model) == "<bos>[user]Be brief.\n\nHello<eot>[assistant]x"
    assert said.notes == (
        "the model's template takes no system message: it stands before the first question",
    )
    asked(talk.ask("More"))
    assert text_of(model).count("Be brief.") == 1


def test_a_template_that_takes_parts_only_gets_parts() -> None:
    inner = "{% for p in m.content %}[{{ p['type'] }}]{{ p.text }}{% endfor %}"
    model = scripted.scripted("x", template="{% for m in messages %}" + inner + "{% endfor %}", bos=None)
    asked(session(model).ask("Hello"))
    assert text_of(model) == "[text]Hellox"


def test_a_template_that_leaves_the_message_out_is_refused() -> None:
    model = scripted.scripted("x", template="{% for m in messages %}[{{ m.role }}]{% endfor %}")
    with pytest.raises(UsageError, match="leaves out what the message says"):
        asked(session(model).ask("Hello"))


def test_what_a_template_raises_is_told() -> None:
    model = scripted.scripted("x", template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="roles must alternate"):
        asked(session(model).ask("Hello"))


def test_a_model_without_a_template_continues_the_text() -> None:
    model = scripted.scripted([*b" upon a time", EOS], [*b" The end.", EOS], template="")
    talk = session(model)
    _, said = asked(talk.ask("Once"))
    assert said.text == " upon a time"  # the space is a part of the text
    asked(talk.ask("Then?"))
    assert text_of(model) == "<bos>Once upon a time\nThen? The end."


def test_a_model_without_a_template_ends_somewhere_and_takes_no_system_text() -> None:
    model = scripted.scripted([*b"abc"], template="")
    assert asked(session(model).ask("x"))[1].answer_tokens == 256
    with pytest.raises(UsageError, match="--system has no effect on a model without a chat template"):
        session(model, system="Be brief.")


def test_a_picture_stands_before_its_message_in_every_turn() -> None:
    model = scripted.scripted("A cat.", "Black.", marker="<image>")
    talk = session(model)
    _, first = asked(talk.ask("What is it?", [Path("cat.png")]))
    assert text_of(model) == "<bos>[user]" + "<?>" * 4 + "What is it?<eot>[assistant]A cat."
    _, second = asked(talk.ask("Which colour?"))
    assert text_of(model).startswith("<bos>[user]" + "<?>" * 4 + "What is it?<eot>[assistant]A cat.<eot>")
    assert second.read_tokens == second.prompt_tokens - first.used  # the picture is not read again


def test_another_picture_is_read() -> None:
    model = scripted.scripted("A cat.", "A dog.", marker="<image>")
    talk = session(model)
    asked(talk.ask("What?", [Path("cat.png")]))
    talk.clear()
    _, said = asked(talk.ask("What?", [Path("dog.png")]))
    assert said.read_tokens == said.prompt_tokens - len("<bos>[user]") + len("<bos>") - 1


def test_what_is_no_number_is_an_error() -> None:
    model = scripted.scripted("x")
    model.read = lambda part, at, stopped: np.full(260, np.nan, np.float32)  # type: ignore[method-assign]
    with pytest.raises(ConversionError, match="the model gives no numbers"):
        asked(session(model).ask("Hello"))
