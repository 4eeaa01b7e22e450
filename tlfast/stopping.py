"""What SIGTERM raises, by its older name."""

from .collecting.signals import Terminated

__all__ = ["Terminated"]
