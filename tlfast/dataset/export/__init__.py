"""A dataset in other formats, and from them."""
