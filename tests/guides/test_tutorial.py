"""The tutorial in guides/README.md, run as it is written; and the public API that it is written in."""

import ast
import inspect
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from contexts import final, run
from every_guide import Endless, random_scores
from tabular_context import tabular_context
from tabular_engine import TabularEngine

from guiderail import guides
from guiderail.guides import SamplingSpec, Scored, Token
from guiderail.guides.core.context import RENAMED
from guiderail.guides.core.registry import describe
from guiderail.guides.core.types import ScoreGroup, TokenPrompt

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL = (ROOT / "guides" / "README.md").read_text().partition("\n## Write your own\n")[2]
BLOCKS = re.findall(r"^```python\n(.*?)^```", TUTORIAL, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """All that the blocks define, one after the other."""
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    for block in BLOCKS:
        exec(compile(block, "guides/README.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("name", ["Shortest", "Best", "Blocks", "Careful"])
async def test_each_guide_of_the_tutorial_runs(name: str, names: dict[str, Any]) -> None:
    engine = TabularEngine({None: Endless(seed=1, end=0.1)})
    guide = names[name](names[name].Params())
    ctx = tabular_context(engine, random_scores(), sampling=SamplingSpec(24, seed=3))
    events = await run(guide, ctx)
    end = final(events)
    answer = end.candidates[end.chosen]
    assert "".join(e.text for e in events if isinstance(e, Token)) == answer.text
    assert describe(names[name]).endswith(".")
    assert engine.num_running() == 0
    if name == "Shortest":
        assert len(answer.text) == min(len(c.text) for c in end.candidates)
        return
    assert any(isinstance(e, Scored) for e in events)
    assert ctx.report.picks == (1 if name == "Best" else sum(isinstance(e, Scored) for e in events))
    assert ctx.report.kl is not None
    if name == "Best":
        assert answer.combined == max(c.combined for c in end.candidates)


async def test_the_reward_of_the_tutorial_scores(names: dict[str, Any]) -> None:
    cls = names["Exclamations"]
    answers = tuple(guides.Answer(text) for text in ("", "Hi!", "Oh!!!!!"))
    (result,) = await cls().score([ScoreGroup((), TokenPrompt((1,)), answers, cls.Params())])
    assert result.values == (0.0, 1.0, 3.0)


def test_the_tutorial_imports_public_names_alone() -> None:
    for node in ast.walk(ast.parse("\n".join(BLOCKS))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guiderail"):
            assert node.module == "guiderail.guides"
            assert {alias.name for alias in node.names} <= set(guides.__all__)


def test_all_that_is_public_is_there_and_listed() -> None:
    assert all(hasattr(guides, name) for name in guides.__all__)
    assert len(set(guides.__all__)) == len(guides.__all__)
    modules = {"args", "best_of_n", "core", "prompters", "scoring", "search", "sampling", "deal", "logit_mix"}
    modules |= {"controlled_decoding", "speculative_rejection", "transfer_q"}
    public = {name for name in vars(guides) if not name.startswith("_")}
    assert public - modules == set(guides.__all__)


def test_the_table_of_the_public_api_has_each_name_and_what_its_docstring_says() -> None:
    lines = re.findall(r"^\| `(\w+)` \| (.+) \|$", TUTORIAL.partition("\n### The public API\n")[2], re.MULTILINE)
    assert sorted(name for name, _ in lines) == sorted(guides.__all__)
    for name, line in lines:
        value = getattr(guides, name)
        if isinstance(value, type | FunctionType):
            assert line == " ".join((inspect.getdoc(value) or "").partition("\n\n")[0].split()), name


def test_what_a_stepwise_guide_needs_is_public() -> None:
    """All that the built-in ones import of what they have in common."""
    stepwise = ("args", "controlled_decoding", "deal", "transfer_q")
    for name in stepwise:
        for node in ast.walk(ast.parse((ROOT / "guides" / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("guiderail.guides.search"):
                assert {alias.name for alias in node.names} <= set(guides.__all__)


def test_old_names_of_a_context_are_refused_with_the_new_ones() -> None:
    ctx = tabular_context(TabularEngine({None: Endless(seed=1)}), random_scores())
    with pytest.raises(AttributeError, match=r"ctx\.select now"):
        _ = ctx.pick  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"no 'nonsense'$"):
        _ = ctx.nonsense  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"seeds\.stream"):
        ctx.seeds(3, 1)
    for name in RENAMED.values():
        found: Any = ctx
        for part in name.split(",")[0].split("."):
            found = getattr(found, part)
