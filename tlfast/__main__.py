"""`python -m tlfast` is `tlfast`."""

from __future__ import annotations

import sys

from .cli import main

sys.exit(main())
