"""Resolving the alignment object: precedence, limits, and an error for every wrong field."""

from typing import Any

import pytest
from fakes import ScriptedEngine, make_state

from guiderail.guides.scoring import COMBINES
from guiderail.guides.transfer_q import TransferQ
from guiderail.server.openai_errors import ApiError
from guiderail.server.requests.resolve import Alignment, Resolver
from guiderail.server.requests.specs import KEYS, NamedSpec, read_alignment
from guiderail.server.rewards.rules import Keywords, Length
from guiderail.server.settings import OperatorLimits, SettingsError

PROFILES = {
    "brief": {"guide": {"name": "best_of_n", "n": 3}, "rewards": [{"name": "length", "target": 5}]},
    "soft": {"rewards": ["length"], "select": {"name": "softmax", "beta": 0.5}},
}


def resolver(**settings: Any) -> Resolver:
    rewards = {"length": Length(), "keywords": Keywords()}
    found: Resolver = make_state(ScriptedEngine(), rewards, profiles=PROFILES, **settings).resolver
    return found


def resolve(rules: Resolver, alignment: Any, suffix: str | None = None) -> Alignment:
    return rules.resolve(read_alignment(alignment), suffix)


def names(alignment: Alignment) -> list[str]:
    return [term.label for term in alignment.rewards]


def test_nothing_asked_is_plain_sampling() -> None:
    found = resolve(resolver(), None)
    assert (found.guide_name, found.rewards) == ("sampling", ())


def test_rewards_alone_mean_best_of_n() -> None:
    found = resolve(resolver(), {"rewards": [{"name": "length"}]})
    assert (found.guide_name, found.guide.params.n) == ("best_of_n", 16)


def test_request_over_profile_over_default() -> None:
    rules = resolver(alignment={"budget": {"max_tokens_generated": 100}, "return_candidates": True})
    found = resolve(rules, {"profile": "brief", "return_candidates": False, "guide": {"name": "best_of_n", "n": 2}})
    assert found.budget.max_tokens_generated == 100  # the default's
    assert names(found) == ["length"]  # the profile's
    assert found.rewards[0].params.target == 5
    assert (found.guide.params.n, found.return_candidates) == (2, False)  # the request's


def test_profile_by_name_and_by_suffix() -> None:
    assert resolve(resolver(), "brief").guide.params.n == 3
    assert resolve(resolver(), None, "brief").guide.params.n == 3
    with pytest.raises(ApiError, match="says profile 'brief'"):
        resolve(resolver(), "soft", "brief")


def test_the_echo_can_be_sent_again() -> None:
    rules = resolver()
    body = {"rewards": [{"name": "length", "weight": -2}, {"name": "keywords", "words": ["a"], "label": "k"}]}
    echo = resolve(rules, body).echo()
    assert resolve(rules, echo).echo() == echo


def test_required_rewards_win_over_the_request() -> None:
    rules = resolver(
        limits=OperatorLimits(required_rewards=[{"name": "length", "target": 7, "weight": 3}]),
        alignment={"guide": "best_of_n"},
    )
    found = resolve(rules, {"rewards": [{"name": "keywords"}]})
    assert names(found) == ["length", "keywords"]
    assert (found.rewards[0].params.target, found.rewards[0].weight) == (7, 3.0)
    assert names(resolve(rules, {"rewards": []})) == ["length"]
    echo = found.echo()
    assert resolve(rules, echo).echo() == echo
    for own in ({"name": "length", "target": 7, "weight": 0}, {"name": "length", "target": 9, "weight": 3}, "length",
                {"name": "length", "target": 7, "weight": 3, "label": "mine"}):  # fmt: skip
        with pytest.raises(ApiError, match="this server requires the reward 'length'") as failure:
            resolve(rules, {"rewards": [{"name": "keywords"}, own]})
        assert failure.value.body["error"]["param"] == "alignment.rewards[1]"
    with pytest.raises(ApiError, match="requires the rewards length") as failure:
        resolve(rules, {"guide": "sampling"})
    assert failure.value.body["error"]["param"] == "alignment.guide.name"


def test_deadline_limit_is_default_and_bound() -> None:
    rules = resolver(limits=OperatorLimits(max_deadline_s=30))
    assert resolve(rules, None).budget.deadline_s == 30
    assert resolve(rules, {"budget": {"deadline_s": 5}}).budget.deadline_s == 5
    with pytest.raises(ApiError, match="at most 30"):
        resolve(rules, {"budget": {"deadline_s": 31}})


@pytest.mark.parametrize(
    ("body", "param", "mentions"),
    [
        ({"guid": {}}, "alignment.guid", "allowed: guide, prompter, rewards"),
        ("nope", "alignment", "known: brief, soft"),
        ({"profile": 3}, "alignment.profile", "string"),
        ({"guide": "nope"}, "alignment.guide.name", "known: best_of_n, sampling"),
        ({"guide": {"n": 4}}, "alignment.guide.name", "required"),
        ({"guide": 4}, "alignment.guide", "name"),
        ({"guide": {"name": "best_of_n", "n": 0}, "rewards": ["length"]}, "alignment.guide.n", "greater"),
        ({"guide": {"name": "best_of_n", "k": 0}, "rewards": ["length"]}, "alignment.guide.k", "allowed here: n, name"),
        ({"guide": "best_of_n"}, "alignment.rewards", "at least one reward"),
        ({"rewards": "length"}, "alignment.rewards", "list"),
        ({"rewards": [{"name": "nope"}]}, "alignment.rewards[0].name", "known: keywords, last_digit, length"),
        ({"rewards": ["length", "length"]}, "alignment.rewards", "label"),
        ({"rewards": [{"name": "length", "weight": "x"}]}, "alignment.rewards[0].weight", "finite number"),
        ({"rewards": [{"name": "length", "weight": True}]}, "alignment.rewards[0].weight", "finite number"),
        ({"rewards": [{"name": "length", "label": ""}]}, "alignment.rewards[0].label", "string"),
        ({"rewards": ["keywords", {"name": "length", "x": 1}]}, "alignment.rewards[1].x", "target"),
        ({"rewards": [{"name": "keywords", "words": [1]}]}, "alignment.rewards[0].words[0]", "string"),
        ({"rewards": [{"name": "keywords", "words": [""]}]}, "alignment.rewards[0]", "empty words"),
        ({"combine": "product"}, "alignment.combine.name", "sum"),
        ({"select": "median"}, "alignment.select.name", "argmax, best_of_poisson"),
        ({"select": {"name": "softmax", "beta": -1}}, "alignment.select.beta", "greater than 0"),
        ({"budget": 3}, "alignment.budget", "object"),
        ({"budget": {"tokens": 3}}, "alignment.budget.tokens", "deadline_s"),
        ({"budget": {"deadline_s": 0}}, "alignment.budget.deadline_s", "greater than 0"),
        ({"return_candidates": "yes"}, "alignment.return_candidates", "true or false"),
    ],
)
def test_wrong_fields_are_named(body: Any, param: str, mentions: str) -> None:
    with pytest.raises(ApiError) as failure:
        resolve(resolver(), body)
    error = failure.value.body["error"]
    assert failure.value.status == 400
    assert error["param"] == param
    assert mentions in error["message"]


def test_a_wrong_profile_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="target"):
        make_state(
            ScriptedEngine(), {"length": Length()}, profiles={"p": {"rewards": [{"name": "length", "target": 0}]}}
        )


@pytest.mark.parametrize("name", [["x"], 3, True])
def test_a_name_that_is_no_text_is_refused(name: Any) -> None:
    with pytest.raises(ApiError, match=r"'alignment\.guide\.name' must be a string"):
        resolve(resolver(), {"guide": {"name": name}})


def test_null_is_as_absent() -> None:
    rules = resolver(alignment={"budget": {"max_tokens_generated": 100}})
    nulls: dict[str, object] = dict.fromkeys(KEYS)
    assert resolve(rules, nulls).echo() == resolve(rules, None).echo()
    assert resolve(rules, nulls | {"profile": "brief"}).echo() == resolve(rules, "brief").echo()
    reward = {"name": "length", "label": None, "weight": None, "transform": None, "target": None, "unit": None}
    parts = {
        "rewards": [reward], "guide": {"name": "best_of_n", "n": None}, "combine": {"name": "maxmin", "beta": None},
        "select": {"name": "softmax", "beta": None, "kl": None}, "budget": {"deadline_s": None},
        "calibration": {"source": None, "n": None}, "prompter": {"name": "urial", "style": None, "examples": None},
    }  # fmt: skip
    short = {"rewards": ["length"], "guide": "best_of_n", "select": "softmax", "prompter": "urial"}
    assert resolve(rules, parts | {"combine": None}).echo() == resolve(rules, short | {"budget": {}}).echo()
    assert COMBINES["maxmin"].model_validate(parts["combine"]) == COMBINES["maxmin"]()


def test_null_stays_where_it_has_a_meaning_of_its_own() -> None:
    spec = NamedSpec("alignment.guide", "transfer_q", {"lookahead": None, "rollouts": None})
    params = spec.parse(TransferQ.Params)
    assert (params.lookahead, params.rollouts) == (None, 1)


def test_an_empty_object_or_list_takes_a_profiles_budget_and_rewards_back() -> None:
    rules = resolver(alignment={"budget": {"max_tokens_generated": 100}})
    found = resolve(rules, {"profile": "brief", "guide": "sampling", "rewards": [], "budget": {}})
    assert (found.guide_name, found.rewards, found.budget.max_tokens_generated) == ("sampling", (), None)


def test_a_profile_of_an_object_precedes_the_model_names() -> None:
    assert resolve(resolver(), {"profile": "brief"}, "soft").guide.params.n == 3


def test_a_configured_alignment_cannot_name_a_profile() -> None:
    with pytest.raises(SettingsError, match=r"alignment\.profile"):
        make_state(ScriptedEngine(), profiles={"p": {"profile": "q"}})
