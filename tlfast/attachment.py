"""Where pickles of hooked models find what a copied hook becomes."""

from .hooks.attachment import _copied as _copied
