"""Extension of vLLM's worker processes (`worker_extension_cls`): memory, threads, and padding of steps."""

import ctypes
import gc
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from guiderail.server.engines.process_monitor import end_with_parent
from guiderail.server.engines.vllm import float32_head  # noqa: F401  (registers it before a model is made)
from guiderail.server.engines.vllm.batch_invariance import make_products_invariant

EXACT_ROWS = 32  # steps of up to so many rows are not padded
MULTIPLE = 8  # larger ones are padded to a multiple of this
HUGE_PAGE = 2 * 2**20  # bytes, on x86
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # madvise(2); Python's mmap has it for its own mappings alone
PRIVATE = re.compile(r"(\w+)-(\w+) rw-p \w+ 00:00 0 *(?:\[heap\])?$", re.M)  # proc_pid_maps(5)


def own_memory(maps: str) -> Iterator[tuple[int, int]]:
    """Yield address and length of the whole huge pages in each part of /proc/PID/maps that is not backed by a file."""
    for found in PRIVATE.finditer(maps):
        begin = -(-int(found[1], 16) // HUGE_PAGE) * HUGE_PAGE
        if (length := int(found[2], 16) // HUGE_PAGE * HUGE_PAGE - begin) > 0:
            yield begin, length


def padded_rows(rows: int, limit: int) -> int:
    """Return the number of rows with which a step of `rows` tokens is computed, at most `limit`."""
    return rows if rows <= EXACT_ROWS else min(limit, -(-rows // MULTIPLE) * MULTIPLE)


class WorkerExtension:
    """Methods that the server calls by name in every worker (collective_rpc)."""

    def leave_uncompiled(self) -> None:
        """On CPU, where the model is not compiled, run uncompiled what else vLLM would compile.

        That is one sum in the sampler, for ranks of log-probabilities: its compiler takes longer to load than it saves.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if runner.device.type == "cpu" and runner.model_config.enforce_eager:
            import torch

            torch.compiler.set_stance("force_eager")

    def settle(self) -> None:
        """Prepare the process for serving, once everything is loaded."""
        end_with_parent()  # a pooling engine has no scheduler of ours to do it (scheduling/scheduler.py)
        self._unpin_helpers()
        self._use_huge_pages()
        self._freeze_heap()

    def make_invariant(self) -> list[str]:
        """On CPU, make products the same for a row in any step; return the layers for which that failed."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        return make_products_invariant(runner.get_model()) if runner.device.type == "cpu" else []

    def _freeze_heap(self) -> None:
        """Exempt present objects from garbage collections, which hold up every sequence that decodes.

        vLLM's own processes do so once they have started, except its CPU worker.
        """
        gc.collect()
        gc.freeze()

    def _unpin_helpers(self) -> None:
        """Let threads that do not compute run on any CPU.

        OpenMP pins a process's main thread, the first of its own, to one CPU. Threads that this one starts (those that
        talk to the server) inherit that, and would take their time from the first part of every product.
        """
        mine = os.sched_getaffinity(0)
        everywhere = os.sched_getaffinity(os.getppid())
        found = True
        while found:  # what a pinned one starts while it is listed here is pinned as well
            found = False
            for thread in map(int, os.listdir("/proc/self/task")):
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    if thread != threading.get_native_id() and os.sched_getaffinity(thread) == mine != everywhere:
                        os.sched_setaffinity(thread, everywhere)
                        found = True

    def _use_huge_pages(self) -> None:
        """On CPU, ask Linux to keep weights and KV cache in huge pages.

        A decoding step reads every weight once, and with pages of 4 KiB looks up an address for each. If Linux has no
        huge pages to give, or is older than 6.1 and gives them later, the process goes on with those it has.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if runner.device.type != "cpu":
            return
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for begin, length in own_memory(Path("/proc/self/maps").read_text()):
            madvise(begin, length, MADV_HUGEPAGE)
            madvise(begin, length, MADV_COLLAPSE)

    def pad_steps(self) -> None:
        """On CPU, pad large steps to few different numbers of rows.

        oneDNN builds kernels for each number of rows that it meets (about 10 ms and 4 MB for a step's products) and
        keeps them. Without padding a first token waits for that whenever its step has a new number of rows, and memory
        grows for hours. It is vLLM's own padding for CUDA graphs, so attention and sampling see no padded row. Workers
        with LoRA adapters do not pad: their products on CPU rely on every row having an adapter.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        dispatcher = getattr(runner, "cudagraph_dispatcher", None)  # the V1 runner's
        if runner.device.type != "cpu" or dispatcher is None or runner.lora_config is not None:
            return
        dispatch = dispatcher.dispatch

        def padded(num_tokens: int, **options: Any) -> Any:
            return dispatch(num_tokens=padded_rows(num_tokens, runner.max_num_tokens), **options)

        dispatcher.dispatch = padded
