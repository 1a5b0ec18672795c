"""A process of the engine ends with the server that started it, however that ended."""

import functools
import multiprocessing
import os
import threading


@functools.cache
def end_with_parent() -> None:
    """Ends this process once the one that started it by `multiprocessing` is gone, without further ado.

    vLLM's processes are ended by the server. One that was killed (out of memory, `kill -9`) cannot do that; they would
    wait for it for good, hold the memory that its successor needs and, while it is gone, heed no SIGTERM.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="guiderail-parent", daemon=True).start()
