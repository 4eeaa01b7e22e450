"""A batch, by the name that losses know it by."""

from .collecting.batches import Batch

__all__ = ["Batch"]
