"""From a model and data to the units of a dataset: settings, batches, losses, the loop, its resume and its ranks."""
