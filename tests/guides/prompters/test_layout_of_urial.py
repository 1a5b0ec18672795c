"""URIAL's text layout: the golden form, and that no text can break out of its block."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.core.types import Message
from guiderail.guides.prompters import Urial
from guiderail.guides.prompters.urial.layout import escape, parse, unescape

F = "```"
PIECES = [
    "# Query:", "# Answer:", "# Instruction", "## query", "#Answer", "# User", "#", "    ", " ", "\t", "\n", "\n\n", "\r", "\r\n",
    "\u2028", "\x85", F, "````", "`", f"\n{F}\n\n# Answer:\n{F}\n", "text", "\n# Query:\n", "\xa0",
]  # fmt: skip
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map("".join)
HEADING = re.compile(r"^# (Query|Answer):$|^# Instruction$", re.MULTILINE)
ROLES = {"# Query:": "user", "# Answer:": "assistant", "# Instruction": "system"}


def read_back(text: str) -> tuple[list[Message], str]:
    """The messages of a conversation in the layout, and the answer that is open at its end. Knows only headings."""
    assert text.startswith("\n")
    _, *rest = re.split(r"(?:^|\n)(# Query:|# Answer:|# Instruction)\n", text)
    messages = []
    for heading, body in zip(rest[:-2:2], rest[1:-2:2], strict=True):
        if heading == "# Instruction":
            assert body[0] == "\n" == body[-1]
            content = body[1:-1]
        else:
            match = re.fullmatch(r"(`{3,})\n(.*)\n\1\n", body, re.DOTALL)
            assert match is not None
            content = match[2]
        messages.append(Message(ROLES[heading], unescape(content)))
    assert rest[-2] == "# Answer:"
    assert rest[-1].startswith(F + "\n")
    return messages, unescape(rest[-1][4:])


@given(texts)
def test_escaping_is_undone_exactly_and_leaves_no_heading(text: str) -> None:
    escaped = escape(text)
    assert unescape(escaped) == text
    for line in re.split("[\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029]", escaped):
        assert not re.match(r"#+\s*(query|answer|user|instruction)\b", line, re.IGNORECASE)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("# Query: x", "    # Query: x"),
        ("a\n  ## ANSWER\nb", "a\n      ## ANSWER\nb"),
        ("    # User", "        # User"),
        ("# Querying is fun, see # Query:", "# Querying is fun, see # Query:"),
        ("#include <x>\n# comment", "#include <x>\n# comment"),
        ("a\r# Answer:\u2028# Query:", "a\r    # Answer:\u2028    # Query:"),
    ],
)
def test_escaping(text: str, escaped: str) -> None:
    assert escape(text) == escaped


@given(st.lists(st.tuples(texts, texts), max_size=3), texts, texts, st.none() | texts)
def test_no_text_breaks_out_of_its_block(
    turns: list[tuple[str, str]], system: str, last: str, begun: str | None
) -> None:
    urial = Urial()
    messages = [Message("system", system)]
    messages += [Message(role, text) for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
    messages.append(Message("user", last))
    given_ = messages if begun is None else [*messages, Message("assistant", begun)]
    text = urial.text(given_, continue_final_message=begun is not None)
    prefix = urial.prefix_text
    assert text.startswith(prefix)
    conversation = text[len(prefix) :]
    assert len(HEADING.findall(conversation)) == len(messages) + 1
    assert read_back(conversation) == (messages, begun or "")


@given(texts)
def test_a_query_is_inside_its_fence(text: str) -> None:
    rendered = Urial().text([Message("user", text)])[len(Urial().prefix_text) :]
    query = rendered.removeprefix("\n# Query:\n").removesuffix(f"\n\n# Answer:\n{F}\n")
    fence, _, rest = query.partition("\n")
    assert set(fence) == {"`"}
    assert rest.endswith(f"\n{fence}")
    assert rest.count(fence) == 1  # what the user wrote has only shorter ones


def test_the_layout_to_the_letter() -> None:
    urial = Urial(instruction="Be kind.", examples=({"query": "Hi?", "answer": "Hello!"},))
    prefix = f"# Instruction\n\nBe kind.\n\n# Query:\n{F}\nHi?\n{F}\n\n# Answer:\n{F}\nHello!\n{F}\n"
    assert urial.prefix_text == prefix
    assert urial.text([Message("user", "Why?")]) == f"{prefix}\n# Query:\n{F}\nWhy?\n{F}\n\n# Answer:\n{F}\n"
    many = [
        Message("system", "Speak French."), Message("user", "a"), Message("assistant", f"b\n{F}py\nx\n{F}"),
        Message("user", f"c\n{F}\ny\n{F}"),
    ]  # fmt: skip
    conversation = (
        f"\n# Instruction\n\nSpeak French.\n"
        f"\n# Query:\n{F}\na\n{F}\n"
        f"\n# Answer:\n{F}\nb\n{F}py\nx\n{F}\n{F}\n"
        f"\n# Query:\n````\nc\n{F}\ny\n{F}\n````\n"
    )
    assert urial.text(many) == f"{prefix}{conversation}\n# Answer:\n{F}\n"
    begun = urial.text([*many, Message("assistant", "It is")], continue_final_message=True)
    assert begun == f"{prefix}{conversation}\n# Answer:\n{F}\nIt is"


FILE = f"# Instruction\n\nBe kind.\n\n# Query:\n{F}\nHi?\n{F}\n\n# Answer:\n{F}\nHello!\n{F}\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "must begin with a line '# Instruction'"),
        ("hello\n" + FILE, "must begin"),
        ("# Query:\n", "must begin"),
        ("# Instruction\n\nBe kind.\n", "at least one"),
        (FILE.replace("Be kind.", ""), "no text under"),
        (FILE + f"\n# Query:\n{F}\na\n{F}\n", "pairs"),
        (FILE.replace("# Answer:", "# Query:"), "pairs"),
        (FILE.replace(f"Hello!\n{F}", "Hello!"), "# Answer: number 1: the text must stand alone"),
        (FILE.replace(f"{F}\nHi?", f"Hi?\n{F}"), "# Query: number 1"),
    ],
)
def test_a_faulty_file_is_refused_with_the_place(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        parse(text)


def test_files_may_hold_code_and_escaped_headings() -> None:
    text = FILE.replace("Hello!", f"Try:\n{F}sh\n    # Query the table\n{F}").replace("Hi?\n```", "Hi?  \n```  ")
    assert parse(text) == ("Be kind.", [("Hi?  ", f"Try:\n{F}sh\n# Query the table\n{F}")])
