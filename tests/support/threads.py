"""Threads of a test: all start at one moment, and none may hang."""

import threading

SECONDS = 60  # far above what any of this takes: only a hang takes longer


def in_threads(*functions):
    """Run functions at the same time, from one starting line; the first error is raised here."""
    line, errors = threading.Barrier(len(functions)), []

    def run(function):
        try:
            line.wait(30)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(f,)) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def within(call, seconds=SECONDS):
    """Call ``call`` in a thread and fail if it hangs; return its result or raise its error."""
    results = []

    def run():
        try:
            results.append((call(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"hangs for more than {seconds} s"
    result, error = results[0]
    if error is not None:
        raise error
    return result
