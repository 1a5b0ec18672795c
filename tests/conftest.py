"""Fixtures shared by all tests: the example plugin, the prepared model, and one real engine and server."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import settings
from serving import Live, engine_dtype, serving

from guiderail.guides.core.interfaces import Services
from guiderail.guides.core.registry import load_guides, load_rewards
from guiderail.guides.core.reward import Reward
from guiderail.server.engines.supervised import SupervisedEngine
from guiderail.server.engines.vllm.engine import build
from guiderail.server.engines.vllm.engine_args import EngineSettings
from guiderail.server.metrics import Metrics
from guiderail.server.models import catalogue
from guiderail.server.models.renderer import ChatRenderer
from guiderail.server.rewards.models.loading import model_reward
from guiderail.server.rewards.models.reward_spec import RewardModelSpec
from guiderail.server.runtime import assemble, start_rewards
from guiderail.server.settings import OperatorLimits, Settings

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) in sys.path:  # `python -m pytest` puts it there; kernels/ must not be importable by its bare name
    sys.path.remove(str(ROOT))

# No deadline: how long an example takes says how busy the machine is. A test run draws the same examples each time, so
# that it says something of the change at hand; `make explore` draws new ones, and what it finds becomes an @example.
settings.register_profile("tests", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))


@pytest.fixture(scope="session")
def plugin_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Installs the example plugin into a folder of its own, which is on sys.path during the session."""
    target = tmp_path_factory.mktemp("plugin")
    source = tmp_path_factory.mktemp("plugin-source") / "src"
    subprocess.run(["cp", "-r", str(ROOT / "tests" / "plugin_example"), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    sys.path.append(str(target))
    yield str(target)
    sys.path.remove(str(target))


@pytest.fixture(scope="session")
def model_path() -> str:
    """Folder of the default model, converted if it is not yet."""
    return catalogue.resolve(catalogue.DEFAULT_MODEL, Settings().cache)


@pytest.fixture(scope="session")
def adapters(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two LoRA adapters made by hand: "zero" changes nothing, "noise" changes the answers."""
    import json

    import torch
    from safetensors.torch import save_file

    config = json.loads((Path(model_path) / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, scale in (("zero", 0.0), ("noise", 0.05)):
        folder = tmp_path_factory.mktemp(f"lora-{name}")
        tensors = {}
        for layer in range(layers):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, hidden, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(hidden, 8, generator=generator) * scale
        save_file(tensors, folder / "adapter_model.safetensors")
        body = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
        (folder / "adapter_config.json").write_text(json.dumps(body))
        made[name] = str(folder)
    return made


@pytest.fixture(scope="session")
def reward_head(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward head with two random heads on the default model, as `guiderail rewards train` would write it."""
    import json

    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("head")
    weight = torch.randn(2, 576, generator=torch.Generator().manual_seed(1)) * 0.03
    save_file({"score.weight": weight}, folder / "head.safetensors")
    card = {"format": "guiderail-reward-head", "version": 1, "base": catalogue.DEFAULT_MODEL, "hidden_size": 576}
    (folder / "reward.json").write_text(json.dumps(card | {"heads": ["one", "two"]}))
    return str(folder)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def live(model_path: str, adapters: dict[str, str], plugin_path: str, reward_head: str) -> AsyncIterator[Live]:
    """The real server over the real engine on a real socket, shared by all tests that need one."""
    settings = Settings(
        dtype=engine_dtype(),
        lora=adapters,
        profiles={"cheerful": {"guide": {"name": "best_of_n", "n": 4}, "rewards": [{"name": "sentiment"}]}},
        limits=OperatorLimits(max_n=8, max_tokens=512, max_candidates=64, max_deadline_s=120),
    )
    engine = SupervisedEngine(
        lambda: build(
            EngineSettings(model=model_path, dtype=settings.dtype, max_model_len=1024, adapters=tuple(adapters.items()))
        )
    )
    await engine.start()
    renderer = ChatRenderer(model_path)
    services = Services(
        engine, renderer, frozenset(adapters), settings.model_name, context=lambda: engine.max_model_len
    )
    rewards: dict[str, Reward] = {name: cls() for name, cls in load_rewards().items()}
    rewards["neural"] = model_reward(RewardModelSpec(path=reward_head), settings.cache, print)
    await start_rewards(rewards, services)
    state = assemble(settings, engine, renderer, load_guides(), rewards, services, Metrics(settings.model_name))
    async with serving(state) as url:
        yield Live(url, state)
    await rewards["neural"].close()
    await engine.close()
