"""One reward of a request, as the pipeline sees it."""

from dataclasses import dataclass

from guiderail.guides.core.types import Params
from guiderail.guides.scoring.chain import IDENTITY, Chain


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """A reward and its parameters, the transforms of its values, and its weight in the combination.

    `label` names its values in the response (the reward's name unless the request says otherwise).
    """

    name: str
    label: str
    weight: float
    params: Params
    chain: Chain = IDENTITY
