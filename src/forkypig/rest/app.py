"""Puts the application together: routes, errors, limits, and the OpenAPI document."""

import json
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from forkypig import errors
from forkypig.daemon.server import VERSION
from forkypig.rest import access, execution, files, instance, machines, pools, resources, snapshots, tenants
from forkypig.rest.caller import AsCaller
from forkypig.rest.deps import PROBLEMS
from forkypig.rest.problems import problem
from forkypig.rest.progress import unexpected
from forkypig.sdk.client import Forky

log = structlog.get_logger()
# A command with its environment and its input is far below; files and archives have a limit of their own.
MOST_BODY_BYTES = 8 << 20
_ROOMS = (machines, files, execution, snapshots, pools, tenants, access, instance)
_DESCRIPTION = """Machines, forks and snapshots over HTTP: the same service that gRPC has.

Errors are problems of RFC 9457. A request that changes something takes an `Idempotency-Key`. Long operations answer at
their end, or with `Accept: text/event-stream` as they go on. Commands and consoles are live over WebSockets."""


def make_app(forky: Forky | None, *, token_needed: bool) -> FastAPI:
    """The ASGI application. `forky`: a connection whose channel is a CallerChannel; None: only to be described."""
    app = FastAPI(
        title="Forky Pig",
        version=VERSION,
        description=_DESCRIPTION,
        openapi_url="/v1/openapi.json",
        docs_url=None,  # its pages load scripts from elsewhere
        redoc_url=None,
        responses=PROBLEMS,
        max_body_size=MOST_BODY_BYTES,
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,
    )
    app.state.forky = forky
    for room in _ROOMS:
        app.include_router(room.router)
    app.add_middleware(AsCaller, token_needed=token_needed)
    app.add_exception_handler(errors.ForkyError, _ours)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _defect)
    app.openapi = lambda: _openapi(app, FastAPI.openapi)  # type: ignore[method-assign]
    return app


async def _ours(_request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.ForkyError)
    return problem(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    sent = request.headers.get("content-type", "")
    if error.errors() and tuple(error.errors()[0]["loc"]) == ("body",) and error.body and "json" not in sent.lower():
        detail = f"the body is JSON alone, and this one says «{sent[:100]}»: send «Content-Type: application/json»"
        return problem(detail, status=415)
    wrong = [{"where": ".".join(map(str, each["loc"])), "what": each["msg"]} for each in error.errors()[:20]]
    first = f"{wrong[0]['where']}: {wrong[0]['what']}" if wrong else "it can't be read"
    detail = f"the request is not possible as it is ({first[:300]}): see /v1/openapi.json"
    return problem(detail, status=422, kind="invalid-request", members={"errors": wrong})


async def _http(request: Request, error: Exception) -> Response:
    """What the framework itself refuses: no such path, another method, a body that is too large or no JSON."""
    assert isinstance(error, HTTPException)
    detail, headers = str(error.detail), dict(error.headers or {})
    if error.status_code == 404:
        detail = f"there is nothing at {request.url.path[:200]}: see /v1/openapi.json"
    elif error.status_code == 405:
        headers["Allow"] = ", ".join(sorted(_methods(request)))  # the framework names those of the first route alone
        detail = f"{request.method[:20]} is not for {request.url.path[:200]}, which takes {headers['Allow']}"
    kinds = {400: "invalid-request", 404: "not-found"}
    return problem(detail, status=error.status_code, kind=kinds.get(error.status_code, ""), headers=headers)


def _methods(request: Request) -> set[str]:
    """Those that a path takes."""
    routes = (route for room in _ROOMS for route in room.router.routes)
    at = (route for route in routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in at for method in getattr(route, "methods", None) or ()}


async def _defect(_request: Request, error: Exception) -> Response:
    log.error("call failed", exc_info=error)
    return problem(unexpected(error))


def _openapi(app: FastAPI, made_by: Any) -> dict[str, Any]:
    """The document, with the problem's schema and how callers are known."""
    if app.openapi_schema is None:
        document = made_by(app)
        components = document["components"]
        problem_schema = resources.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        components["schemas"].update(problem_schema.pop("$defs", {}))
        components["schemas"]["Problem"] = problem_schema
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}, {}]
        document["servers"] = [{"url": "/"}]
    return app.openapi_schema or {}


def openapi_text() -> str:
    """The document as docs/openapi.json has it: sorted, so that a change is a small one."""
    return json.dumps(make_app(None, token_needed=False).openapi(), indent=1, sort_keys=True) + "\n"
