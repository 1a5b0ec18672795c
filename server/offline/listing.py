"""The commands that only print: models, guides, rewards, version."""

import sys
from importlib.metadata import version as distribution_version

from guiderail.guides.core.registry import describe, load_guides, load_rewards
from guiderail.server.models.catalogue import DEFAULT_MODEL, EMBEDDED, ModelError, check, location, prepare
from guiderail.server.settings import Settings


def models(settings: Settings, name: str | None) -> int:
    """List the embedded models, or prepare the one named. Raises ModelError."""
    if name is not None:
        if name not in EMBEDDED:
            raise ModelError(f"no embedded model '{name}'; there are: {', '.join(EMBEDDED)}")
        folder = prepare(EMBEDDED[name], settings.cache, lambda text: print(text, file=sys.stderr))
        print(folder)
        return 0
    for model in EMBEDDED.values():
        fault = check(location(model, settings.cache))
        state = "prepared" if fault is None else "not prepared" if fault == "missing" else f"broken: {fault}"
        default = " (default)" if model.name == DEFAULT_MODEL else ""
        print(f"{model.name}{default}\n    {model.description}\n    {state}")
    return 0


def plugins(kind: str) -> int:
    """List guides or rewards with their parameters."""
    classes = load_guides() if kind == "guides" else load_rewards()
    for name, cls in classes.items():
        print(f"{name}\n    {describe(cls)}")
        for field, info in cls.Params.model_fields.items():
            print(f"    {info.alias or field} = {info.default!r}")
    return 0


def version() -> int:
    """Print the version."""
    print(distribution_version("guiderail"))
    return 0
