"""Imported by a daemon's program before all else: keeps rich out, which structlog imports for consoles if it is there.
It is 0.1 s of CPU at each start, for what a daemon never shows."""

import sys
from typing import Any, cast

cast(Any, sys.modules)["rich"] = None
