"""What rewards can read, asked before any work is done for a request: a text that is too long costs nobody anything."""

from collections.abc import Mapping, Sequence

from guiderail.guides.core.dialogue import Dialogue
from guiderail.guides.core.errors import RequestError
from guiderail.guides.core.reward import Reward
from guiderail.guides.core.types import Answer
from guiderail.guides.scoring import RewardTerm
from guiderail.server.openai_errors import bad_request


def room(
    rewards: Mapping[str, Reward], terms: Sequence[RewardTerm], dialogue: Dialogue, answers: tuple[Answer, ...] = ()
) -> tuple[int, str] | None:
    """Return the most tokens that an answer may have, and the reward that reads no more; None if all read any number.

    answers: those that are known. Raises ApiError (400) naming the reward if something is too long.
    """
    least: tuple[int, str] | None = None
    for term in terms:
        try:
            found = rewards[term.name].room(dialogue.group(answers, term.params))
        except RequestError as error:
            raise bad_request(f"reward '{term.name}': {error}", error.param, "context_length_exceeded") from error
        if found is not None and (least is None or found < least[0]):
            least = found, term.name
    return least
