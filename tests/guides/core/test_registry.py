"""Discovery of guides and rewards through entry points."""

from pathlib import Path

import pytest

from guiderail.guides.core.errors import PluginError
from guiderail.guides.core.registry import describe, load_guides, load_rewards

BUILT_IN = {"keywords", "length", "regex", "json_schema", "offensive", "sentiment", "judge", "implicit"}


def test_built_ins_come_through_entry_points() -> None:
    assert {"sampling", "best_of_n"} <= set(load_guides())
    assert set(load_rewards()) >= BUILT_IN


def test_a_third_party_package_is_found(plugin_path: str) -> None:
    assert describe(load_rewards()["exclamations"]) == "Counts exclamation marks."
    assert describe(load_guides()["shortest"]) == "Draws four answers and returns the shortest."


def test_an_allow_list_loads_nothing_else() -> None:
    assert list(load_rewards(["length"])) == ["length"]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(PluginError, match=r"'nope'.*best_of_n"):
        load_guides(["nope"])


def install(folder: Path, name: str, entries: str, source: str = "") -> None:
    """A package of one module, as pip would leave it."""
    (folder / f"{name}.py").write_text(source)
    info = folder / f"{name}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(entries)


FINE = (
    "from guiderail import guides\nclass Thing(guides.TextReward):\n  'D.'\n  def score_text(self, p, a, q): return 1.0"
)


def test_a_name_that_two_packages_give_is_refused_with_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path,
        "usurper",
        "[guiderail.rewards]\nlength = usurper:Thing\n[guiderail.guides]\nsampling = usurper:G\n",
        FINE,
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"'length' is in two packages: .*guiderail.*") as failure:
        load_rewards()
    assert "usurper (usurper:Thing)" in str(failure.value)
    with pytest.raises(PluginError, match="'sampling' is in two packages"):
        load_guides(["sampling"])
    assert list(load_rewards(["sentiment"])) == ["sentiment"]  # what is not asked for does not matter


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("raise RuntimeError('no licence')", "no licence"),
        ("class Thing: pass", "not a subclass of Reward"),
        ("from guiderail.guides import TextReward\nclass Thing(TextReward):\n  pass", "no docstring"),
        (
            "from guiderail import guides\nclass Thing(guides.TextReward):\n  'D.'\n"
            "  class Params(guides.Params):\n    needed: int",
            "needs a default",
        ),
        (
            "from typing import Callable\nfrom guiderail import guides\nclass Thing(guides.TextReward):\n  'D.'\n"
            "  class Params(guides.Params):\n    call: Callable[[], int] | None = None",
            "no JSON schema",
        ),
    ],
)
def test_a_broken_plugin_is_an_error_by_its_name(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"broken_{abs(hash(source))}"
    install(tmp_path, module, f"[guiderail.rewards]\nbroken = {module}:Thing\n", source)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=message) as failure:
        load_rewards()
    assert "'broken'" in str(failure.value)
