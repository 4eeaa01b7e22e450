"""Whether a dataset is whole, and dropping what isn't."""
