"""The conversation of one answer: how the policy that writes it is asked, and how rewards read what it wrote."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from guiderail.guides.core.decoder import Decoder
from guiderail.guides.core.interfaces import Renderer
from guiderail.guides.core.reward import begun
from guiderail.guides.core.types import Answer, Message, Params, SamplingSpec, ScoreGroup, TokenPrompt
from guiderail.guides.prompters.prompter import Cleaner, Prompter, Template, with_system


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A conversation, and the policy that answers it: its prompt and how it is sampled.

    messages: the conversation as the request has it. renderer, model_name: the served model's. prompter: what made
    `prompt` of the conversation. cleaner: makes a filter for one answer's text. continues: whether the answer goes on
    with the last message; None: if that is the assistant's. told: what policies of this answer are told besides, in
    the order of telling.
    """

    messages: tuple[Message, ...]
    prompt: TokenPrompt
    sampling: SamplingSpec
    renderer: Renderer
    model_name: str = ""
    prompter: Prompter = field(default_factory=Template)
    cleaner: Callable[[], Cleaner] = Cleaner
    continues: bool | None = None
    told: tuple[str, ...] = ()

    @property
    def begun(self) -> str:
        """The beginning of the answer that the conversation ends with, or ""."""
        return begun(self.messages)

    @property
    def view(self) -> tuple[Message, ...]:
        """The conversation as rewards read it: with all that the policies which write this answer were told.

        One view holds for everything that is scored, rollouts of a baseline and calibration answers too: a reward's
        values can only be compared where they are of the same conversation.
        """
        return with_system(self.messages, *self.told, self.prompter.says)

    def telling(self, texts: Sequence[str]) -> "Dialogue":
        """The dialogue with what a policy of this answer is told besides the conversation."""
        new = [text for text in dict.fromkeys(texts) if text and text not in self.told]
        return replace(self, told=(*self.told, *new)) if new else self

    def render(self, prompter: Prompter, messages: Sequence[Message]) -> TokenPrompt:
        """A conversation that ends as the request's does, as a prompter's prompt. Raises RequestError."""
        goes_on = bool(self.messages) and self.messages[-1].role == "assistant"
        goes_on = goes_on if self.continues is None else self.continues
        return prompter.render(
            messages, self.renderer, add_generation_prompt=not goes_on, continue_final_message=goes_on
        )

    def clean(self, text: str) -> str:
        """The answer in a text that the policy wrote, without what belongs to its prompt's layout."""
        return self.cleaner().clean(text)

    def decoder(self) -> Decoder:
        """A decoder of this answer's tokens."""
        return Decoder(self.renderer, self.prompt, skip_special_tokens=self.sampling.skip_special_tokens)

    def answer(self, text: str, token_ids: tuple[int, ...], *, partial: bool = False) -> Answer:
        """The answer as rewards read it: the policy's text without its layout, and the tokens that are left."""
        clean = self.clean(text)
        if clean != text:
            token_ids = token_ids[: self.decoder().kept(token_ids, text.find(clean) + len(clean))]
        return Answer(clean, token_ids, partial)

    def group(self, answers: tuple[Answer, ...], params: Params) -> ScoreGroup:
        """Answers of this policy, to be scored by a reward with these parameters."""
        return ScoreGroup(self.view, self.prompt, answers, params, partial(self.render, self.prompter))
