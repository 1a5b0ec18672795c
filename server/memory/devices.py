"""CUDA devices of this machine and their free memory, as the engine's own process will see them.

They are measured in a process that ends at once: a CUDA context takes half a GiB of every device that is looked at, and
this process, which serves for days, should have one only where its own models are.
"""

import json
import subprocess
import sys
from dataclasses import dataclass

from guiderail.guides.core.errors import GuiderailError

PROBE = """
import json, torch
found = []
for i in range(torch.cuda.device_count()):
    free, total = torch.cuda.mem_get_info(i)
    found.append({"index": i, "name": torch.cuda.get_device_name(i), "total": total, "free": free})
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A visible CUDA device: its number, and its total and free memory in bytes."""

    index: int
    name: str
    total: int
    free: int


def gpus() -> tuple[Gpu, ...]:
    """Return the visible CUDA devices in their order; none where torch has no CUDA or finds no device.

    Takes some seconds where there are any. Raises GuiderailError if a device cannot be queried.
    """
    import torch

    if not torch.cuda.is_available():
        return ()
    run = subprocess.run([sys.executable, "-P", "-c", PROBE], capture_output=True, text=True)
    if run.returncode:
        why = run.stderr.strip().splitlines() or [f"status {run.returncode}"]
        raise GuiderailError(f"the CUDA devices cannot be asked for their memory: {why[-1]}")
    return tuple(Gpu(**each) for each in json.loads(run.stdout.strip().splitlines()[-1]))
