"""What a pass of a packed runner takes to its device."""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from guiderail.kernels.prefix_layout import on_device


class Copies(TorchDispatchMode):
    """Counts the copies between devices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's own
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **kwargs or {})


def test_many_arrays_go_to_a_device_by_one_copy() -> None:
    arrays = [np.arange(n, dtype=np.int32).reshape(-1, 1) for n in (1, 5, 0, 33)] + [np.arange(3, dtype=np.int64)]
    with Copies() as copies:
        moved = on_device(arrays, "meta")
    assert copies.count == 1
    assert [tuple(each.shape) for each in moved] == [array.shape for array in arrays]


def test_they_arrive_as_they_were() -> None:
    arrays = [np.arange(n, dtype=dtype).reshape(-1, 1) for n in (1, 5, 0, 33) for dtype in (np.int32, np.int64)]
    for array, tensor in zip(arrays, on_device(arrays, "cpu"), strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert tensor.numpy().dtype == array.dtype
