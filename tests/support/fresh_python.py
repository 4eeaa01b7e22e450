"""A Python process of its own, on the tlfast that is tested: for what happens at import and in a build."""

import os
import subprocess
import sys

from checkout import ROOT


def run(*command, folder=ROOT, **env):
    # The package of another build comes before the checkout, which is the folder too, hence PYTHONSAFEPATH.
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
