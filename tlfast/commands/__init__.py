"""What each command of `tlfast` does: a function from its arguments to its exit code. See cli.py for the table."""
