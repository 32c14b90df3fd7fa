"""What each call takes: one table, which a test proves to name every method of every service.

A method that is not in it is the operator's: whoever adds one has to say who else may call it.
"""

from forkypig.errors import PermissionDenied
from forkypig.model.access import Principal, Role

# Asked by whatever watches over the daemon, before anybody is known.
OPEN = frozenset({"grpc.health.v1.Health"})

_VIEWER, _USER, _ADMIN = Role.VIEWER, Role.USER, Role.ADMIN
OPERATOR = None  # whoever runs this installation

# The least role for each method, by service.
_LEAST: dict[str, dict[str, Role | None]] = {
    "forkypig.v1.Controller": {
        "GetStatus": _VIEWER,
        "Doctor": OPERATOR,
        "RunMachine": _USER,
        "Fork": _USER,
        "TakeSnapshot": _USER,
        "GetMachine": _VIEWER,
        "ListMachines": _VIEWER,
        "PauseMachine": _USER,
        "ResumeMachine": _USER,
        "StopMachine": _USER,
        "StartMachine": _USER,
        "RestoreMachine": _USER,
        "HibernateMachine": _USER,
        "WakeMachine": _USER,
        "RemoveMachine": _USER,
        "UpdateMachine": _USER,
        "ReadConsole": _VIEWER,
        "ListSnapshots": _VIEWER,
        "GetSnapshot": _VIEWER,
        "GetHistory": _VIEWER,
        "TagSnapshot": _USER,
        "UntagSnapshot": _USER,
        "RemoveSnapshot": _USER,
        "PackSnapshot": _USER,
        "DiffMemory": _USER,
        "ListEvents": _VIEWER,
        "BuildImage": OPERATOR,
        "ListImages": _VIEWER,
        "GetImage": _VIEWER,
        # Those that are the tenant's alone, as the service sees to.
        "UpdateImage": _USER,
        "RemoveImage": _USER,
    },
    # What is read in a guest may be secret.
    "forkypig.v1.Agent": {"Exec": _USER, "Upload": _USER, "Download": _USER, "StatPath": _USER},
    "forkypig.v1.Store": {
        "ExportSnapshot": _USER,
        "ImportSnapshot": _USER,
        "PushSnapshot": _USER,
        "PullSnapshot": _USER,
        "ListRemote": _USER,
        "CollectStore": OPERATOR,
        "CheckStore": OPERATOR,
    },
    "forkypig.v1.Tenants": {
        "CreateTenant": OPERATOR,
        "ListTenants": OPERATOR,
        "GetTenant": _VIEWER,
        "SetQuota": OPERATOR,
        "RemoveTenant": OPERATOR,
        "GetKsm": OPERATOR,
        "SetKsm": OPERATOR,
        "ShareSnapshot": _USER,
        "UnshareSnapshot": _USER,
    },
    "forkypig.v1.Observation": {"FollowEvents": _VIEWER, "GetUsage": _VIEWER, "GetMetrics": OPERATOR},
    "forkypig.v1.Pools": {
        "CreatePool": _ADMIN,
        "ListPools": _VIEWER,
        "GetPool": _VIEWER,
        "ScalePool": _ADMIN,
        "RemovePool": _ADMIN,
        "Acquire": _USER,
        "Release": _USER,
        "Renew": _USER,
    },
    "forkypig.v1.Auth": {
        "WhoAmI": _VIEWER,
        "CreateToken": _ADMIN,
        "ListTokens": _ADMIN,
        "RevokeToken": _ADMIN,
        "ReadAudit": _ADMIN,
    },
    # It tells of every method, so only those hear it who may call some.
    "grpc.reflection.v1alpha.ServerReflection": {"ServerReflectionInfo": _VIEWER},
}
LEAST: dict[str, Role | None] = {
    f"/{service}/{method}": role for service, methods in _LEAST.items() for method, role in methods.items()
}

METRICS = "/forkypig.v1.Observation/GetMetrics"


def is_open(method: str) -> bool:
    """Whether anybody may call it. `method` is "/package.Service/Method", here and below."""
    return method.split("/")[1] in OPEN


def only_looks(method: str) -> bool:
    """Whether it changes nothing: what a viewer may call."""
    return LEAST.get(method) is Role.VIEWER or method == METRICS


def check_may(who: Principal, method: str) -> None:
    """Raises PermissionDenied where their role does not suffice."""
    if who.operator:
        return
    least = LEAST.get(method, OPERATOR)
    if method == METRICS and who.role is Role.METRICS:
        return
    if least is None:
        raise PermissionDenied(f"{_short(method)} is for the operator of this installation alone: ask them")
    if not who.role.includes(least):
        raise PermissionDenied(
            f"{_short(method)} takes the role «{least.value}» and you have «{who.role.value}»: "
            "ask an admin of your tenant for a token with that role"
        )


def _short(method: str) -> str:
    return method.rpartition("/")[2]
