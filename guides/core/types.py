"""Value types that guides, rewards and the engine exchange.

They know nothing of HTTP, vLLM or torch. Token ids are plain ints, log-probabilities natural logs,
times seconds.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Generic, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import TypeVar

PROMPT = "prompt"
LARGEST_FACTOR = 1e9  # beyond it a factor says no more, and its products with rewards (up to 1e100) come near infinity
MAX_TEMPERATURE = 2.0  # of sampling: what OpenAI documents, and the engine takes
Factor = Annotated[float, Field(ge=0, le=LARGEST_FACTOR)]
Divisor = Annotated[float, Field(ge=1 / LARGEST_FACTOR, le=LARGEST_FACTOR)]


class Fields(BaseModel):
    """Base of a request's objects: frozen, no unknown fields, no NaN or infinity; null leaves a field at its default.

    A field whose type has null among its values keeps it: there it may mean something else than the default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if not isinstance(data, Mapping) or not any(value is None for value in data.values()):
            return data
        kept = {
            info.alias or name for name, info in cls.model_fields.items() if type(None) in get_args(info.annotation)
        }
        return {name: value for name, value in data.items() if value is not None or name in kept}


def _title(model: type) -> str:
    """Name in the JSON schema that clients see: parameters are called so whatever their class is called."""
    return "Params" if model.__name__.endswith("Params") else model.__name__


class Params(Fields):
    """Parameters of a guide or reward: frozen, every field with a default, unknown fields refused."""

    model_config = ConfigDict(model_title_generator=_title)


P_co = TypeVar("P_co", bound=Params, default=Params, covariant=True)


class NotNamed(ValueError):
    """A value that is neither a name nor an object with one. named: what an object has as its name, if it is one."""

    def __init__(self, *, is_object: bool, named: object = None) -> None:
        text = f"'name' must be a string, not {named!r}" if is_object else "must be a name or an object with one"
        super().__init__(text)
        self.is_object = is_object
        self.named = named


@dataclass(frozen=True, slots=True)
class Named:
    """The name, and the other fields of the object."""

    name: str
    params: Mapping[str, object]


def read_named(value: object) -> Named:
    """Read a bare name or an object with `name`. Raises NotNamed."""
    if isinstance(value, str):
        return Named(value, {})
    if not isinstance(value, Mapping):
        raise NotNamed(is_object=False)
    name = value.get("name")
    if not isinstance(name, str):
        raise NotNamed(is_object=True, named=name)
    return Named(name, {key: field for key, field in value.items() if key != "name"})


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn: `role` is "system", "user" or "assistant".

    A text completion, which has no turns, is one message of role PROMPT with the prompt's text.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Mixed:
    """Another policy mixed into a TokenPrompt: its own prompt in token ids, its LoRA adapter, and its weight.

    A negative weight steers away from the policy.
    """

    token_ids: tuple[int, ...]
    adapter: str | None
    weight: float


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt in token ids, and the LoRA adapter (by the operator's name) that continues it.

    With `mix`, the next token at temperature T is distributed as  p ~ (pi_0 * prod_i pi_i^{w_i})^{1/T},  where pi_0 is
    the prompt's own policy with the logit bias and penalties of its SamplingSpec, and pi_i are the mixed ones as they
    are. Tokens with pi_0 < plausibility * max pi_0 are left out first (contrastive decoding, arXiv 2210.15097, eq. 3).
    """

    token_ids: tuple[int, ...]
    adapter: str | None = None
    mix: tuple[Mixed, ...] = ()
    plausibility: float = 0.0

    def extended(self, token_ids: Iterable[int]) -> "TokenPrompt":
        """The prompt with these tokens behind it, for every policy in it."""
        more = tuple(token_ids)
        mix = tuple(Mixed(m.token_ids + more, m.adapter, m.weight) for m in self.mix)
        return TokenPrompt(self.token_ids + more, self.adapter, mix, self.plausibility)


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """Sampling of continuations. Names and meanings are vLLM's; None leaves a feature off.

    `stream=False` asks the engine for one delta per finished sequence instead of one per token: cheaper
    where nothing is shown before the end.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    skip_special_tokens: bool = True
    json_schema: Mapping[str, object] | None = None
    stream: bool = True
    priority: int = 0
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one emitted token, and of the most likely ones at that place.

    Once its text has been delivered, `part` is that text and `offset` where it begins, in characters; tokens that share
    a character have its whole text in common.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0
    part: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """Gain of a sequence since its last delta; `row` is its number among the prompts.

    `finish_reason` is None while the sequence runs, then "stop" or "length" as in OpenAI's API, or
    "deadline", "budget" or "dropped" when the engine was told to give the sequence up.
    """

    row: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole or partial answer to score. `partial` marks one that was cut off or goes on."""

    text: str
    token_ids: tuple[int, ...] = ()
    partial: bool = False


@dataclass(frozen=True, slots=True)
class ScoreGroup(Generic[P_co]):
    """Answers that share a prompt and a reward's parameters: the unit of a score call.

    messages: the conversation with all that the policy was told. prompt: what the policy continues.
    params: an instance of the reward's own `Params`. render: puts another conversation before the served model as
    the request's is put, with its prompter; None: with the chat template. owner: tells requests apart, for fairness.
    """

    messages: tuple[Message, ...]
    prompt: TokenPrompt
    answers: tuple[Answer, ...]
    params: P_co
    render: Callable[[Sequence[Message]], TokenPrompt] | None = None
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate answer, with its scores once it has been scored.

    `rewards` holds raw values by the label of the reward in the request, `transformed` what became of them, `combined`
    what selection saw, `tie` what orders candidates of equal `combined`. `adjusted` is the score of a selection rule
    that changes scores, `weight` the probability with which a rule that samples would take it.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stop_reason: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    transformed: Mapping[str, float] = field(default_factory=dict)
    combined: float | None = None
    tie: float = 0.0
    adjusted: float | None = None
    weight: float | None = None

    @property
    def finished(self) -> bool:
        """True if the answer ended by itself or at its token limit."""
        return self.finish_reason in ("stop", "length")


@dataclass(frozen=True, slots=True)
class Token:
    """Event: committed text, that is, text that will not be taken back."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """Event: candidates that were scored (for observers; it commits nothing)."""

    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Final:
    """Event: the answer is complete. Exactly one, and the last.

    `finish_reason` is OpenAI's: "stop", "length" or "content_filter"; `stop_reason` says what made it stop, as vLLM
    does: a stop string or token, or a word of the guide's own. `stopped_by` is "deadline" or "budget" when a limit cut
    the work short, else None. `chosen` is the index of the answer in `candidates`.
    """

    finish_reason: str
    stop_reason: int | str | None
    stopped_by: str | None
    chosen: int
    candidates: tuple[Candidate, ...]


Event = Token | Scored | Final
