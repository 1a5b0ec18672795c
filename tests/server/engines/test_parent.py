"""A process of the engine's does not outlive the one that started it."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from guiderail.server.engines.process_monitor import end_with_parent

PARENT = """
import multiprocessing, time
from test_child import child
if __name__ == "__main__":
    started = [multiprocessing.get_context("{how}").Process(target=child) for _ in range(2)]
    for each in started:
        each.start()
    print(*(each.pid for each in started), flush=True)
    time.sleep(60)
"""
CHILD = """
import signal, time
from guiderail.server.engines.process_monitor import end_with_parent
def child():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_children_end_with_a_parent_that_was_killed(how: str, tmp_path: Path) -> None:
    (tmp_path / "test_child.py").write_text(CHILD)
    main = tmp_path / "parent.py"
    main.write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PARENT.format(how=how)}")
    parent = subprocess.Popen([sys.executable, str(main)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    try:
        time.sleep(1)
        assert len(children) == 2
        assert all(each.is_running() for each in children), "they live as long as their parent does"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive
    finally:
        parent.kill()
        parent.wait()
        for each in children:
            if each.is_running():
                each.kill()


def test_a_process_that_multiprocessing_did_not_start_goes_on() -> None:
    assert multiprocessing.parent_process() is None
    end_with_parent()
