"""Commands over an offline server end in order on a signal."""

import os
import signal
import subprocess
import sys

import pytest

from guiderail.guides.core.types import Answer, Message, ScoreGroup, TokenPrompt
from guiderail.server.offline.offline_state import offline
from guiderail.server.rewards.rules import Length
from guiderail.server.settings import Settings


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_offline_command_in_order(number: int, model_path: str) -> None:
    script = (
        "import asyncio\n"
        "from guiderail.server.offline.offline_state import run_offline\n"
        "from guiderail.server.settings import Settings\n"
        "async def main(state):\n"
        "    print('ready', flush=True)\n"
        "    try: await asyncio.sleep(60)\n"
        "    finally: print('let go', flush=True)\n"
        "settings = Settings(rewards=['length'], guides=['sampling'])\n"
        "raise SystemExit(run_offline(settings, main, engine=False))\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=30)[0] == "let go\n"
    assert process.returncode == 130


def test_what_the_process_started_before_goes_on(model_path: str) -> None:
    script = (
        "import subprocess, sys\n"
        "from guiderail.server.offline.offline_state import run_offline\n"
        "from guiderail.server.settings import Settings\n"
        "async def main(state): return 0\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
        "with subprocess.Popen(sleep) as before:\n"
        "    run_offline(Settings(rewards=['length'], guides=['sampling']), main, engine=False)\n"
        "    print(before.poll())\n"
        "    before.kill()\n"
    )
    process = subprocess.run([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True, env=os.environ)
    assert process.stdout == "None\n"


async def test_no_serving_deadline_holds_offline(model_path: str) -> None:
    """A batch of scores may take longer than any request would wait for it."""
    async with offline(Settings(rewards=["length"], guides=["sampling"]), engine=False) as state:
        assert state.scorer.timeout_s is None
        group = ScoreGroup((Message("user", "q"),), TokenPrompt((1,)), (Answer("a b"),), Length.Params(target=2))
        assert (await state.scorer.score("length", group)).values == (0.0,)
