"""Where files lie: this machine's disks, object stores, and what each guarantees."""
