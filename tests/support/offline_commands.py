"""Arguments of offline commands as their parsers give them, and a gold reward that over-optimisation lowers."""

import argparse
from typing import Any

from guiderail.guides import Params, TextReward


def parsed(module: Any, *words: str) -> argparse.Namespace:
    """Arguments of a command's module."""
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(words)


class Hump(TextReward):
    """Highest in the middle of the digits: gold that falls once the proxy has been chased too far."""

    class Params(Params):
        top: float = 5.0

    def score_text(self, prompt: str, answer: str, params: Any) -> float:
        return -abs(float(answer.split()[0][-1]) - params.top)
