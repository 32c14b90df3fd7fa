"""What several routes have in common: the SDK's connection, and how their answers are described."""

from typing import Annotated, Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from forkypig.rest.bodies import IdempotencyKey
from forkypig.rest.problems import MEDIA_TYPE
from forkypig.rest.progress import EVENT_STREAM
from forkypig.sdk.client import Forky


def _connection(connection: HTTPConnection) -> Forky:
    forky: Forky = connection.app.state.forky
    return forky


def _key(idempotency_key: IdempotencyKey = None) -> None:
    """Only described and checked here: `caller` passes it on."""


Sdk = Annotated[Forky, Depends(_connection)]
# Of every route that changes something.
CHANGES = [Depends(_key)]
_PROBLEM = {"content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The request is wrong, or not possible now", **_PROBLEM},
    "5XX": {"description": "The host, the machine or a daemon failed", **_PROBLEM},
}
# The answer to a long operation, besides the JSON of its result.
STREAM = {EVENT_STREAM: {"schema": {"type": "string", "description": "events: progress …, then result or problem"}}}
BYTES = {"schema": {"type": "string", "format": "binary"}}
TEXT = {"schema": {"type": "string"}}
