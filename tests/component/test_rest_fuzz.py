"""The REST API fuzzed from its own OpenAPI document: nothing that is sent makes it fail, and all that it says is as
documented. The same examples in every run."""

import asyncio
import os
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from forkypig.daemon.settings import Settings
from forkypig.rest.app import make_app
from forkypig.rest.caller import CallerChannel
from forkypig.rest.listening import Address, bound
from forkypig.rest.server import made_server
from forkypig.sdk.client import Forky
from tests.component.controller_rig import home, serving
from tests.component.rest_rig import running_guests

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
EXAMPLES = int(os.environ.get("FORKY_FUZZ_EXAMPLES", "4"))  # of each operation
schema = schemathesis.openapi.from_dict(make_app(None, token_needed=False).openapi()).exclude(
    name="PUT /v1/machines/{machine}/archive"
)
# Some fifty more of each operation, by rule and not by chance: half a minute.
schema.config.phases.coverage.enabled = bool(os.environ.get("FORKY_TEST_LONG"))


class Served(threading.Thread):
    """A host, a controller, and the REST API on a port of its own, on a loop of their own: schemathesis is blocking."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.ready = threading.Event()
        self.port = 0
        self._stop: Any = None

    def run(self) -> None:
        with home() as settings:
            asyncio.run(self._serve(settings))

    async def _serve(self, settings: Settings) -> None:
        async with (
            running_guests(settings),
            serving(settings),
            Forky(settings.home, start=False, token="", tenant="", wrap_channel=CallerChannel) as forky,  # type: ignore[arg-type]
        ):
            await forky.run(name="web")
            await (await forky.get("web")).snapshot("clean")
            server = made_server(make_app(forky, token_needed=False))
            with bound(Address(host="127.0.0.1")) as listener:
                self.port = listener.getsockname()[1]
                self._stop = lambda: setattr(server, "should_exit", True)
                self.ready.set()
                await server.serve([listener])

    def end(self) -> None:
        self._stop()
        self.join(30)


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    served = Served()
    served.start()
    assert served.ready.wait(60)
    yield f"http://127.0.0.1:{served.port}"
    served.end()


@schema.hook
def map_path_parameters(context: Any, parameters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Half of the names are of what is there, or nothing but «not found» would be tried. It is never removed."""
    for name, there in (("machine", "web"), ("snapshot", "clean"), ("image", "debian-12")):
        if parameters and context.operation.method != "delete" and len(str(parameters.get(name, "x"))) % 2 == 0:
            parameters[name] = there
    return parameters


@schema.hook
def map_body(context: Any, body: Any) -> Any:
    """Thousands of children say no more than three."""
    if isinstance(body, dict) and isinstance(body.get("count"), int) and 3 < body["count"] <= 1000:
        body["count"] = 3
    return body


@schema.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_whatever_is_sent(case: schemathesis.Case, base_url: str) -> None:
    case.call_and_validate(base_url=base_url, checks=CHECKS, timeout=30)
