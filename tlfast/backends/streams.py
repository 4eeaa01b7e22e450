"""The order of a GPU's work, for the Python backend: current streams, and what waits for what.

Does what csrc/streams.h does natively. Only CUDA has streams here: others work in the order of the host.
"""

from __future__ import annotations

import torch


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The current stream of a GPU, or None where nothing is done later."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def read_on(stream: torch.cuda.Stream, tensor: torch.Tensor) -> None:
    """Tell the allocator that a stream reads a tensor whose memory may be another stream's."""
    tensor.record_stream(stream)


class StepInput:
    """A tensor that a step is given, a mask or what gradients are multiplied with; and where it was made."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor, self._stream = tensor, current_stream(tensor.device)
        self._made = None if self._stream is None else self._stream.record_event()

    def here(self) -> torch.Tensor:
        """The tensor for the current stream of its device: another one than that which made it comes after that."""
        stream = current_stream(self.tensor.device)
        if stream is not None and self._made is not None and stream != self._stream:
            stream.wait_event(self._made)
            read_on(stream, self.tensor)
        return self.tensor
