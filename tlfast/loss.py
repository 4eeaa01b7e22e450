"""The default loss, by the name that others were given for it."""

from .collecting.loss import next_token_loss

__all__ = ["next_token_loss"]
