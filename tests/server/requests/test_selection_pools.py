"""Which selection rule goes with which guide: whatever is not valid is a 400 that names what is."""

from typing import Any

import pytest
from fakes import LetterRenderer, ScriptedEngine

from guiderail.guides.core.guide import Guide
from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.registry import load_guides
from guiderail.guides.scoring import POOL_KINDS, SELECTIONS
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.resolve import Alignment, Resolver
from guiderail.server.requests.specs import read_alignment
from guiderail.server.rewards.rules import Length
from guiderail.server.settings import OperatorLimits

FIELDS: dict[str, dict[str, Any]] = {
    "likelihood": {"beta": 0.1, "per": "sum"},
    "pessimism": {"r_max": 1},
    "f_divergence": {"divergence": "forward_kl"},
}
DRAWS = {"argmax", "softmax", "mbr", "likelihood", "pessimism", "f_divergence", "tournament"}
TOKENS = {"argmax", "softmax"}
ALLOWED: list[tuple[dict[str, Any], set[str]]] = [
    ({"name": "best_of_n"}, DRAWS | {"best_of_poisson"}),
    ({"name": "speculative_rejection"}, {"argmax", "likelihood", "tournament"}),
    ({"name": "controlled_decoding"}, DRAWS),
    ({"name": "transfer_q", "block": 1}, TOKENS),
    ({"name": "transfer_q", "block": 4}, DRAWS),
    ({"name": "args"}, TOKENS),
    ({"name": "deal"}, TOKENS),
    ({"name": "deal", "beams": 3}, {"argmax", "tournament"}),
]


class Undeclared(Guide):
    """Says nothing of its pools."""

    async def run(self, ctx: Any) -> Any:
        yield


def resolver() -> Resolver:
    engine, renderer = ScriptedEngine(), LetterRenderer()
    services: Any = Services(engine, renderer)  # type: ignore[arg-type]
    guides = {**load_guides(), "undeclared": Undeclared}
    return Resolver(guides, {"length": Length()}, services, {}, {}, OperatorLimits())


def resolve(rules: Resolver, alignment: Any, suffix: str | None = None) -> Alignment:
    return rules.resolve(read_alignment(alignment), suffix)


@pytest.mark.parametrize("rule", SELECTIONS)
@pytest.mark.parametrize(("guide", "allowed"), ALLOWED, ids=lambda each: str(each)[:60])
def test_each_rule_goes_with_the_guides_whose_pools_it_is_valid_for(
    guide: dict[str, Any], allowed: set[str], rule: str
) -> None:
    body = {"guide": guide, "rewards": ["length"], "select": {"name": rule, **FIELDS.get(rule, {})}}
    if rule in allowed:
        assert resolve(resolver(), body).selection.name == rule
        return
    with pytest.raises(ApiError) as failure:
        resolve(resolver(), body)
    error = failure.value.body["error"]
    assert (failure.value.status, error["param"]) == (400, "alignment.select")
    assert f"'{rule}'" in error["message"]
    assert f"'{guide['name']}'" in error["message"]
    assert error["message"].endswith(f"allowed with it: {', '.join(sorted(allowed))}")


def test_every_guide_that_selects_says_what_from() -> None:
    built_in = {name: cls for name, cls in load_guides().items() if cls.__module__.startswith("guiderail.guides.")}
    for name, cls in built_in.items():
        pools = cls(cls.Params()).pools()
        assert bool(pools) == (name not in ("sampling", "logit_mix")), name
        assert set(pools) <= set(POOL_KINDS)
    assert {name for name, rule in SELECTIONS.items() if rule.valid_for == set(POOL_KINDS)} == {"argmax"}


def test_a_guide_that_does_not_say_gets_argmax_alone() -> None:
    assert resolve(resolver(), {"guide": "undeclared", "rewards": ["length"]}).selection.name == "argmax"
    with pytest.raises(ApiError, match=r"does not declare.*allowed with it: argmax$"):
        resolve(resolver(), {"guide": "undeclared", "rewards": ["length"], "select": "softmax"})


def test_a_rule_is_checked_against_the_pool_that_it_gets() -> None:
    """Not against all candidates that are alive: two blocks of four rollouts each are a pool of two."""
    select = {"name": "pessimism", "r_max": 1}
    body = {"guide": {"name": "controlled_decoding", "k": 2, "rollouts": 4}, "rewards": ["length"], "select": select}
    with pytest.raises(ApiError, match="at least 3 candidates"):
        resolve(resolver(), body)


@pytest.mark.parametrize(
    ("select", "param"),
    [
        ({"name": "softmax", "beta": 0.1, "kl": 1.0}, "alignment.select.kl"),
        ({"name": "f_divergence", "divergence": "reverse_kl", "beta": 1, "kl": 1}, "alignment.select.kl"),
        ({"name": "best_of_poisson", "mu": 3, "kl": 1.0}, "alignment.select.kl"),
        ({"name": "softmax", "kl": 0}, "alignment.select.kl"),
        ({"name": "softmax", "kl": "much"}, "alignment.select.kl"),
    ],
)
def test_a_temperature_and_a_kl_are_one_or_the_other(select: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as failure:
        resolve(resolver(), {"guide": "best_of_n", "rewards": ["length"], "select": select})
    assert (failure.value.status, failure.value.body["error"]["param"]) == (400, param)


def test_the_echo_of_a_target_can_be_sent_again() -> None:
    for select, beta, kl in (("softmax", 0.1, None), ({"name": "softmax", "kl": 1.0}, None, 1.0)):
        echo = resolve(resolver(), {"guide": "best_of_n", "rewards": ["length"], "select": select}).echo()
        assert (echo["select"]["beta"], echo["select"]["kl"]) == (beta, kl)
        assert resolve(resolver(), echo).echo() == echo
