"""End of an engine's process together with the server that started it, however the server ended."""

import functools
import multiprocessing
import os
import threading


@functools.cache
def end_with_parent() -> None:
    """Exit at once when the process that started this one by `multiprocessing` is gone.

    The server ends vLLM's processes. A server that was killed (out of memory, `kill -9`) cannot; they would wait for it
    forever, hold the memory that its successor needs, and ignore SIGTERM.
    """
    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="guiderail-parent", daemon=True).start()
