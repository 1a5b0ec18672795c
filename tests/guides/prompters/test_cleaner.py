"""The filter that finds where an answer between fences ends, whole and while it streams."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guiderail.guides.prompters import Cleaner
from guiderail.guides.prompters.urial.fenced import STOPS, FencedCleaner

F = "```"
PIECES = [
    "`", "``", F, "````", "\n", "\n\n", " ", "    ", "a", "text", "# Query:", "# Query", "# Question:", "# Answer: x", "#",
    "# User", "# a comment", "python", f"\n{F}\n", f"\n{F}python\n", f"\n{F}\n\n# Query:\n{F}\n", "é", "\r\n", "\u2028",
]  # fmt: skip
outputs = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=25).map("".join)

paragraphs = st.sampled_from(
    ["One line.", "Two\nlines.", "1. a\n2. b", "Use `x` here.", f"See {F}x{F} inline.", "# A heading", "## Query plan"]
)
code_lines = st.sampled_from(
    ["x = 1", "", "# Query the table", "# Query:", "# Query: all users", "    return x", "# Answer"]
)
code = st.builds(
    lambda info, first, rest: "\n".join([f"{F}{info}", first, *rest, "x", F]),
    st.sampled_from(["", "python", "sh -e"]),
    st.sampled_from(["x = 1", "# Query the table", "# Query: all", "SELECT 1"]),
    st.lists(code_lines, max_size=4),
)
answers = st.lists(paragraphs | code, min_size=1, max_size=5).map("\n\n".join)


def clean(text: str, continued: str = "") -> str:
    return FencedCleaner(continued).clean(text)


def streamed(text: str, cuts: list[int], continued: str = "") -> list[str]:
    cleaner = FencedCleaner(continued)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [cleaner.push(text[a:b]) for a, b in pairwise(places)] + [cleaner.finish()]


@given(outputs, st.lists(st.integers(0, 120)), st.sampled_from(["", "So ", f"Look:\n{F}py\n", "``", "a\n"]))
def test_any_chunking_shows_what_the_whole_text_shows(text: str, cuts: list[int], continued: str) -> None:
    assert "".join(streamed(text, cuts, continued)) == clean(text, continued)


@given(outputs)
def test_one_character_at_a_time(text: str) -> None:
    assert "".join(streamed(text, list(range(len(text))))) == clean(text)


@given(outputs, st.sampled_from(["", "So ", f"Look:\n{F}py\n"]))
def test_the_answer_is_a_part_of_the_output(text: str, continued: str) -> None:
    shown = clean(text, continued)
    assert (text if continued else text.lstrip()).startswith(shown)
    assert shown == shown.rstrip()


@given(
    answers,
    st.sampled_from([F, "````", F + "  "]),
    st.sampled_from(["", "\n", "\n\n", "\n\n# Query:\n```\nhi", "\n# Query"]),
)
def test_a_well_formed_answer_comes_back_as_it_is(answer: str, fence: str, more: str) -> None:
    assert clean(f"{answer}\n{fence}{more}") == answer
    assert "".join(streamed(f"{answer}\n{fence}{more}", list(range(500)))) == answer


@given(answers, st.sampled_from(STOPS))
def test_what_the_engine_leaves_before_a_stop_string_gives_the_same_answer(answer: str, stop: str) -> None:
    output = f"{answer}\n{F}\n{stop}\nmore"
    at = min(place for s in STOPS if (place := output.find(s)) >= 0)
    assert clean(output[:at]) == clean(output) == answer


@given(answers)
def test_no_stop_string_is_in_an_answer_with_code(answer: str) -> None:
    assert not any(stop in f"{answer}\n{F}" for stop in STOPS)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("plain", "plain"),
        ("\n\n  plain \n", "plain"),
        ("", ""),
        (F, ""),
        (f"{F}\n\n# Query:\n{F}\nhi", ""),
        (f"a\n{F}", "a"),
        (f"a\n{F}\n\nand more", "a"),
        (f"a\n{F}\n# Question:\n{F}", "a"),
        (f"a\n{F}\n\n# Question 2:\nhi\n{F}\n\n# Answer:\n{F}", "a"),
        # code is kept, with its fences
        (f"a\n{F}py\nx\n{F}\n{F}", f"a\n{F}py\nx\n{F}"),
        (f"a\n{F}\nx\n{F}\nb\n{F}", f"a\n{F}\nx\n{F}\nb"),
        (f"a: {F}py\nx\n{F}\n\nb\n{F}", f"a: {F}py\nx\n{F}\n\nb"),
        (f"{F}py\nx\n{F}\n{F}\n\n# Query:", f"{F}py\nx\n{F}"),
        # the closing fence was forgotten after a code block
        (f"a\n{F}py\nx\n{F}\n\n# Query:\n{F}\nhi", f"a\n{F}py\nx\n{F}"),
        (f"a\n{F}py\nx\n{F}\n\n# Query: hi", f"a\n{F}py\nx\n{F}"),
        # and without any code
        (f"a\n\n# Query:\n{F}\nhi", "a"),
        ("a\n\n# Query:\n\nhi", "a"),
        ("a\n# Query: how are you", "a\n# Query: how are you"),
        # comments in code
        (f"{F}sh\n# Query\nx\n{F}\n{F}", f"{F}sh\n# Query\nx\n{F}"),
        (f"{F}sh\n# Query:\n\nx\n{F}\n{F}", f"{F}sh\n# Query:\n\nx\n{F}"),
        # cut off in the middle
        (f"a\n{F}py\nx =", f"a\n{F}py\nx ="),
        (f"a\n{F}py", f"a\n{F}py"),
        # three backticks that are no fence
        (f"Write {F} to open a block.\n{F}", f"Write {F} to open a block."),
    ],
)
def test_where_answers_end(output: str, answer: str) -> None:
    assert clean(output) == answer


def test_text_is_shown_as_soon_as_it_is_known_to_be_the_answers() -> None:
    cleaner = FencedCleaner()
    assert [cleaner.push(piece) for piece in ["Hel", "lo", " ", "you", "\n", "`", "``", "\n", "\n"]] == [
        "Hel", "lo", "", " you", "", "", "", "", "",
    ]  # fmt: skip
    assert cleaner.push("more") == cleaner.finish() == ""
    cleaner = FencedCleaner()
    assert [cleaner.push(piece) for piece in ["a\n", F, "py", "\nx", "\n# Qu", "ick", "\n", F, "\n"]] == [
        "a", "", "\n```py", "\nx", "", "\n# Quick", "", "", "\n```",
    ]  # fmt: skip


def test_a_continued_answer_goes_on_where_it_stood() -> None:
    assert clean(" world\n```", "Hello") == " world"
    assert clean("x\n```\nDone.\n```", f"Code:\n{F}py\n") == f"x\n{F}\nDone."
    assert clean("x\n```\nDone.\n```", f"Code:\n{F}\n") == f"x\n{F}\nDone."
    assert clean("`\n\n# Query:\n```", "a\n``") == "`"  # a fence that the request began is not the model's end
    assert clean("\nb", f"a\n{F}\n\nhi") == "\nb"


def test_the_plain_cleaner_keeps_everything() -> None:
    assert Cleaner().clean(f" a\n{F}\n\n# Query:\n") == f" a\n{F}\n\n# Query:\n"
