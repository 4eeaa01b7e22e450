"""What lies in the files of a dataset, byte for byte: docs/format.md."""
