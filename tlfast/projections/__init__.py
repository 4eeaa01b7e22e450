"""Random projections of gradients, written down for ever in docs/projections.md: the same bits on every machine."""
