"""Reading a dataset: rows by number, in batches, joined, shown, from the hub."""
