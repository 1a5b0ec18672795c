"""A third-party reward and a third-party guide, as small as they get."""

from collections.abc import AsyncGenerator

from guiderail import guides
from guiderail.guides import Context, Event, Guide, TextReward, answer_events, draw_scored


class Exclamations(TextReward):
    """Counts exclamation marks."""

    class Params(guides.Params):
        at_most: int = 3

    def score_text(self, prompt: str, answer: str, params: "Exclamations.Params") -> float:
        return float(min(answer.count("!"), params.at_most))


class Shortest(Guide):
    """Draws four answers and returns the shortest."""

    steers = False  # not by rewards

    def candidates(self) -> int:
        return 4

    async def run(self, ctx: Context) -> AsyncGenerator[Event, None]:
        drawn = await draw_scored(ctx, 4)
        for event in answer_events(min(drawn, key=lambda c: len(c.text)), drawn, None):
            yield event
