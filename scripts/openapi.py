"""Writes docs/openapi.json from the REST API as it is. `make openapi`; a test says when it is out of date."""

import json
from pathlib import Path

from forkypig.rest.app import make_app

TARGET = Path(__file__).parents[1] / "docs/openapi.json"


def document() -> str:
    """The document as it is kept: sorted, so that a change is a small one."""
    return json.dumps(make_app(None, token_needed=False).openapi(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    TARGET.write_text(document())
