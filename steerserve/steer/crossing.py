"""Between the host and the device without a wait: there in one pinned copy, back behind an event.

A copy from or to pageable memory waits for all that the device has yet to do, and so does every value that is
read back at once: the host would fall behind the step that it prepares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["arriving", "sent"]

T = TypeVar("T")
# At multiples of which every part begins: kernels are compiled anew for pointers that are not.
_ALIGNED = 16


def sent(arrays: Mapping[str, NDArray[Any]], device: torch.device | str) -> dict[str, Tensor]:
    """Arrays as tensors on the device, in one copy that the host does not wait for.

    Returns: under the same names and of the same shapes; all are parts of one tensor.
    """
    ends = list(accumulate(-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays.values()))
    begins = zip(arrays, [0, *ends[:-1]], strict=True)
    places = {name: slice(begin, begin + arrays[name].nbytes) for name, begin in begins}
    pinned = torch.device(device).type == "cuda"
    # While a model is loaded, tensors of no named device may be made on the GPU.
    packed = torch.zeros(ends[-1], dtype=torch.uint8, device="cpu", pin_memory=pinned)
    for name, array in arrays.items():
        packed.numpy()[places[name]] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return {
        name: there[places[name]].view(getattr(torch, array.dtype.name)).view(array.shape)
        for name, array in arrays.items()
    }


def arriving(tensor: Tensor, read: Callable[[Tensor], T]) -> Callable[[], T]:
    """What `read` makes of the values that a tensor has now. Only the call waits for the copy to the host."""
    # Torch takes pinned memory for a copy from a GPU that is not waited for.
    host = tensor.to("cpu", non_blocking=True, copy=True)
    if not tensor.is_cuda:
        return lambda: read(host)
    arrived = torch.cuda.Event()
    arrived.record()

    def wait() -> T:
        arrived.synchronize()
        return read(host)

    return wait
