"""Writing a dataset: the folder, units, their commits, the background thread, uploads."""
