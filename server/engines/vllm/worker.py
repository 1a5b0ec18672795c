"""What Guiderail adds to vLLM's worker processes (`worker_extension_cls`)."""

import ctypes
import gc
import os
import re
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from guiderail.server.engines.parent import end_with_parent
from guiderail.server.engines.vllm import float32_head  # noqa: F401  (registers it before a model is made)
from guiderail.server.engines.vllm.batch_invariance import make_products_invariant

EXACT_ROWS = 32  # steps up to so many rows are left as they are
MULTIPLE = 8  # larger ones are padded to multiples of this
HUGE_PAGE = 2 * 2**20  # bytes, on x86
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # madvise(2); Python's mmap has it for its own mappings alone
PRIVATE = re.compile(r"(\w+)-(\w+) rw-p \w+ 00:00 0 *(?:\[heap\])?$", re.M)  # proc_pid_maps(5)


def own_memory(maps: str) -> Iterator[tuple[int, int]]:
    """Address and length of the whole huge pages in each piece of memory in /proc/PID/maps that no file is behind."""
    for found in PRIVATE.finditer(maps):
        begin = -(-int(found[1], 16) // HUGE_PAGE) * HUGE_PAGE
        if (length := int(found[2], 16) // HUGE_PAGE * HUGE_PAGE - begin) > 0:
            yield begin, length


def padded_rows(rows: int, limit: int) -> int:
    """How many rows a step of `rows` tokens is computed with; `limit` is the most that the worker has room for."""
    return rows if rows <= EXACT_ROWS else min(limit, -(-rows // MULTIPLE) * MULTIPLE)


class WorkerExtension:
    """Methods that the engine's client can call in a worker by name (collective_rpc)."""

    def leave_uncompiled(self) -> None:
        """On CPU, where the model is not compiled, runs what else vLLM would compile as it stands.

        That is one sum in the sampler, for ranks of log-probabilities: its compiler takes longer to load than it saves.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        if runner.device.type == "cpu" and runner.model_config.enforce_eager:
            import torch

            torch.compiler.set_stance("force_eager")

    def settle(self) -> None:
        """Once everything is loaded: what vLLM leaves to be done for a process that serves for long."""
        end_with_parent()  # a pooling engine has no scheduler of ours to do it (vllm/scheduling)
        self._unpin_helpers()
        self._use_huge_pages()
        self._freeze_heap()

    def make_invariant(self) -> list[str]:
        """On CPU, makes products the same for a row in any step; returns the layers where that failed."""
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        return make_products_invariant(runner.get_model()) if runner.device.type == "cpu" else []

    def _freeze_heap(self) -> None:
        """Takes what is there now out of later garbage collections, which hold up every row that decodes.

        vLLM's own processes do so once they have started, except its CPU worker.
        """
        gc.collect()
        gc.freeze()

    def _unpin_helpers(self) -> None:
        """Lets threads that do not compute run on any CPU.

        OpenMP pins the thread that starts a process, which is the first of its own, to one CPU; whatever that starts
        (the threads that talk to the server) inherits it, and would take its time from the first part of every product.
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
        """On CPU, asks Linux to keep weights and KV cache in huge pages.

        A decoding step reads every weight once; where pages have 4 KiB it looks up an address for each of them. Where
        Linux has no huge pages to give, or is older than 6.1 and gives them later, it goes on with what there is.
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
        """On CPU, pads large steps to few numbers of rows.

        oneDNN builds kernels for each number of rows that it meets (about 10 ms and 4 MB for a step's products) and
        keeps them; without padding a first token waits for that whenever its step has a new number, and memory grows
        for hours. It is the padding that vLLM does for CUDA graphs, so attention and sampling see no padded row.
        Workers with LoRA adapters are left alone: their products on CPU count on every row having an adapter.
        """
        runner: Any = self.model_runner  # type: ignore[attr-defined]
        dispatcher = getattr(runner, "cudagraph_dispatcher", None)  # the V1 runner's
        if runner.device.type != "cpu" or dispatcher is None or runner.lora_config is not None:
            return
        dispatch = dispatcher.dispatch

        def padded(num_tokens: int, **options: Any) -> Any:
            return dispatch(num_tokens=padded_rows(num_tokens, runner.max_num_tokens), **options)

        dispatcher.dispatch = padded
