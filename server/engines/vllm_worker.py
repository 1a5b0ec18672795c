"""What Guiderail adds to vLLM's worker processes (`worker_extension_cls`)."""

import gc


class WorkerExtension:
    """Methods that the engine's client can call in a worker by name (collective_rpc)."""

    def freeze_heap(self) -> None:
        """Takes what is there now out of later garbage collections, which hold up every row that decodes.

        vLLM's own processes do so once they have started, except its CPU worker.
        """
        gc.collect()
        gc.freeze()
