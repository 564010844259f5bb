"""A copy from a device to the host that runs while the host goes on."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["HostCopy"]


class HostCopy:
    """Starts to copy a tensor to the host; :meth:`wait` waits until it is complete.

    On CUDA the copy goes to pinned memory and the wait is for this copy, not for what was launched after it. Elsewhere
    a copy on the device is made at once, which later writes to the tensor do not reach.

    Args:
        tensor: Any tensor.

    Example:
        >>> import torch
        >>> copy = HostCopy(torch.tensor([1, 2]))
        >>> copy.wait()
        tensor([1, 2])
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.cuda.Event | None = None
        if not tensor.is_cuda:
            self._tensor = tensor.detach().clone()
        else:
            host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._tensor = host.copy_(tensor.detach(), non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """The tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.cpu()
