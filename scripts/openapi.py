"""Writes docs/openapi.json from the REST API as it is; a test says when it is out of date."""

from pathlib import Path

from forkypig.rest.app import openapi_text

(Path(__file__).parents[1] / "docs/openapi.json").write_text(openapi_text())
