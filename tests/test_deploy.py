"""The configuration examples that are shipped work as they stand."""

from pathlib import Path

import pytest
from fakes import ScriptedEngine, make_state

from guiderail.guides.core.registry import load_rewards
from guiderail.server.settings import load

PROFILES = sorted((Path(__file__).parents[1] / "deploy" / "profiles").glob("*.yaml"))


@pytest.mark.parametrize("path", PROFILES, ids=lambda p: p.name)
def test_shipped_configuration_resolves(path: Path) -> None:
    settings = load({}, str(path))
    rewards = {name: cls() for name, cls in load_rewards().items()}
    state = make_state(ScriptedEngine(), rewards, profiles=settings.profiles, limits=settings.limits)
    assert state.resolver.profile_names == sorted(settings.profiles)
