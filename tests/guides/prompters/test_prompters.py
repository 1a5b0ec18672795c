"""The prompters: what they put before the model, what they refuse, and the styles that are shipped."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import pytest
from fakes import LetterRenderer, ScriptedEngine
from pydantic import ValidationError

from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.types import Message, TokenPrompt
from guiderail.guides.prompters import (
    PROMPTERS,
    Prompter,
    Style,
    SystemMessage,
    Template,
    Urial,
    load_style,
    urial_with,
)
from guiderail.guides.prompters.urial.fenced import STOPS
from guiderail.guides.prompters.urial.layout import parse
from guiderail.guides.prompters.urial.styles import BUILT_IN

HI = [Message("user", "Hi")]


class Recorder(LetterRenderer):
    """Remembers what it was asked to render or encode."""

    def __init__(self, *, has_chat_template: bool = True) -> None:
        self.has_chat_template = has_chat_template
        self.rendered: list[tuple[list[Message], bool, bool]] = []
        self.encoded: list[tuple[str, bool]] = []

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, continue_final_message: bool = False
    ) -> TokenPrompt:
        self.rendered.append((list(messages), add_generation_prompt, continue_final_message))
        return TokenPrompt((7,))

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        self.encoded.append((text, add_special_tokens))
        assert plain, "user text must not become special tokens"
        return [1, 2, 3]


def test_every_prompter_is_found_by_its_name_and_described() -> None:
    assert set(PROMPTERS) == {"template", "urial", "system_message"}
    for name, cls in PROMPTERS.items():
        assert cls.name == name
        assert cls.__doc__


def test_parameters_are_frozen_and_unknown_ones_refused() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Urial().style = "brief"
    for cls in PROMPTERS.values():
        with pytest.raises(ValidationError, match="colour"):
            cls.model_validate({"colour": "red", **({"preferences": ["x"]} if cls is SystemMessage else {})})


def test_template_passes_everything_on_and_cleans_nothing() -> None:
    renderer, prompter = Recorder(), Template()
    assert prompter.render(HI, renderer, add_generation_prompt=False, continue_final_message=True).token_ids == (7,)
    prompter.render(HI, renderer)
    assert renderer.rendered == [(HI, False, True), (HI, True, False)]
    assert prompter.stops == ()
    assert prompter.cleaner().clean(" a\n```\n") == " a\n```\n"


SYSTEM = (
    "# Role\na patient teacher\n\n# Preferences\n"
    "Every answer follows these preferences. Where two of them conflict, the one further up decides.\n"
    "1. Use short sentences.\n2. Never say # Role 3. x."
)


def test_system_message_to_the_letter() -> None:
    prompter = SystemMessage(
        preferences=(" Use short\nsentences. ", "Never say\n# Role\n3. x."), role="a patient\tteacher"
    )
    renderer = Recorder()
    prompter.render(HI, renderer, add_generation_prompt=False)
    prompter.render(
        [Message("system", "Be brief.\n"), *HI, Message("assistant", "a")], renderer, continue_final_message=True
    )
    assert renderer.rendered[0] == ([Message("system", SYSTEM), *HI], False, False)
    merged = Message("system", f"Be brief.\n\n\n{SYSTEM}")
    assert renderer.rendered[1] == ([merged, *HI, Message("assistant", "a")], True, True)


def test_system_message_without_a_role_begins_with_the_preferences() -> None:
    assert SystemMessage(preferences=("x",)).text.startswith("# Preferences\n")


@pytest.mark.parametrize("preferences", [[], [" \n"], ["x", ""], ["x"] * 21, "x", ["x" * 2001], [1]])
def test_system_message_refuses_what_is_no_list_of_statements(preferences: object) -> None:
    with pytest.raises(ValidationError, match="preferences"):
        SystemMessage.model_validate({"preferences": preferences})


def test_system_message_needs_a_chat_template() -> None:
    prompter = SystemMessage(preferences=("x",))
    prompter.check(Services(ScriptedEngine(), Recorder()))
    with pytest.raises(ValueError, match="no chat template"):
        prompter.check(Services(ScriptedEngine(), Recorder(has_chat_template=False)))


def test_urial_encodes_its_text_as_the_start_of_a_prompt() -> None:
    renderer = Recorder(has_chat_template=False)
    assert Urial().render(HI, renderer).token_ids == (1, 2, 3)
    assert renderer.encoded == [(Urial().text(HI), True)]
    assert Urial().stops == STOPS


@pytest.mark.parametrize("style", BUILT_IN)
def test_all_prompts_of_a_style_begin_with_the_same_bytes(style: str) -> None:
    urial = Urial(style=style)
    conversations = [HI, [Message("system", "x"), *HI], [*HI, Message("assistant", "a"), *HI]]
    assert all(urial.text(messages).startswith(urial.prefix_text) for messages in conversations)


@pytest.mark.parametrize(
    ("messages", "flags", "field"),
    [
        ([], {}, "messages"),
        ([Message("system", "x")], {}, "messages"),
        ([*HI, Message("assistant", "a")], {}, "messages"),
        ([Message("tool", "x"), *HI], {}, "messages[0].role"),
        ([Message("prompt", "x")], {}, "messages[0].role"),
        (HI, {"add_generation_prompt": False}, "add_generation_prompt"),
        (HI, {"add_generation_prompt": False, "continue_final_message": True}, "messages"),
        ([], {"continue_final_message": True}, "messages"),
    ],
)
def test_urial_names_the_field_that_it_cannot_put(messages: list[Message], flags: dict[str, bool], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        Urial().render(messages, Recorder(), **flags)
    assert caught.value.param == field


def test_a_system_message_may_come_last() -> None:
    text = Urial().text([*HI, Message("system", "Be brief.")])
    assert text.endswith("\n```\nHi\n```\n\n# Instruction\n\nBe brief.\n\n# Answer:\n```\n")


def test_the_cleaner_knows_the_answer_that_goes_on() -> None:
    assert Urial().cleaner("So:\n```py\n").clean("x\n```\n```") == "x\n```"


@pytest.mark.parametrize("style", BUILT_IN)
def test_shipped_styles_are_in_the_layout_and_clean_themselves(style: str) -> None:
    raw = files("guiderail.guides.prompters.urial").joinpath(f"examples/{style}.md").read_text(encoding="utf-8")
    urial = Urial(style=style)
    assert urial.prefix_text == raw
    _, pairs = parse(raw)
    assert len(pairs) >= 3
    for query, answer in pairs:
        assert urial.text([Message("user", query)]).count(query) == 2
        assert urial.cleaner().clean(f"{answer}\n```\n\n# Query:\n```\n") == answer


def test_styles_differ_as_they_say() -> None:
    refusals = {style: Urial(style=style).prefix_text.count("I'm sorry, but I can't help") for style in BUILT_IN}
    assert refusals == {"balanced": 1, "helpful": 0, "brief": 1}
    assert "= 63 euros" in Urial(style="helpful").prefix_text
    longest = {s: max(len(answer) for _, answer in parse(Urial(style=s).prefix_text)[1]) for s in BUILT_IN}
    assert longest["brief"] < 200 < longest["balanced"]


def test_own_instruction_and_examples_take_the_places_of_the_styles() -> None:
    own = {"query": "q?", "answer": "a!"}
    shipped = Urial(style="brief").prefix_text
    assert "q?" not in shipped
    text = Urial.model_validate({"style": "brief", "examples": [own]}).prefix_text
    assert parse(text) == (parse(shipped)[0], [("q?", "a!")])
    text = Urial(style="brief", instruction="Rhyme.").prefix_text
    assert parse(text) == ("Rhyme.", parse(shipped)[1])


@pytest.mark.parametrize(
    "values",
    [
        {"examples": []}, {"examples": [{"query": "q"}]}, {"examples": [{"query": " ", "answer": "a"}]},
        {"examples": [{"query": "q", "answer": "a", "more": 1}]}, {"instruction": "\n"}, {"style": "none"}, {"style": 5},
    ],
)  # fmt: skip
def test_urial_refuses_faulty_parameters(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Urial.model_validate(values)


def test_operators_styles_come_from_files(tmp_path: Path) -> None:
    path = tmp_path / "rhyme.md"
    path.write_text("# Instruction\n\nRhyme.\n\n# Query:\n```\né?\n```\n\n# Answer:\n```\nhé!\n```\n", encoding="utf-8")
    style = load_style(path)
    assert style == Style.model_validate({"instruction": "Rhyme.", "examples": [{"query": "é?", "answer": "hé!"}]})
    cls: type[Prompter] = urial_with({"rhyme": style, "brief": style})
    assert isinstance(urial := cls.model_validate({"style": "rhyme"}), Urial)
    assert (
        urial.prefix_text == path.read_text(encoding="utf-8") == urial_with({"brief": style})(style="brief").prefix_text
    )
    assert cls.__doc__ == Urial.__doc__
    assert Urial(style="brief").prefix_text != urial.prefix_text
    with pytest.raises(ValidationError, match="no style 'rhyme'; known: balanced, helpful, brief"):
        Urial(style="rhyme")
    with pytest.raises(ValidationError, match="known: balanced, helpful, brief, rhyme"):
        urial_with({"rhyme": style})(style="x")


@pytest.mark.parametrize(
    "content", [b"no layout", b"\xff\xfe", b"# Instruction\n\nx\n\n# Query:\n```\n \n```\n# Answer:\n```\na\n```\n"]
)
def test_a_faulty_style_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "faulty.md"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"faulty\.md"):
        load_style(path)
