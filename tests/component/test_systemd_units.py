"""The units of packaging/systemd: what they start, what keeps machines alive, and what systemd itself says of them.

systemd does not run where tests do, so that machines outlive a restart is shown by what it rests on: tests/live kills
daemons, and a unit says KillMode=process.
"""

import asyncio
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from forkypig.sdk import local
from tests.component.controller_rig import home

UNITS = Path(__file__).parents[2] / "packaging/systemd"
_INSTALLED = "/opt/forkypig/.venv"
# Each gives a service a mount namespace of its own (systemd.exec(5)), in which others don't see its mounts.
_WITH_A_NAMESPACE = (
    *("ProtectSystem", "ProtectHome", "PrivateTmp", "PrivateDevices", "ProtectKernelTunables", "ProtectControlGroups"),
    *("ProtectKernelLogs", "ProtectKernelModules", "ProtectProc", "ProcSubset", "ReadWritePaths", "ReadOnlyPaths"),
    *("InaccessiblePaths", "BindPaths", "BindReadOnlyPaths", "TemporaryFileSystem", "PrivateIPC", "RootDirectory"),
    *("StateDirectory", "DynamicUser"),
)


class _Unit(dict[str, list[str]]):
    def __init__(self, name: str) -> None:
        super().__init__()
        for line in (UNITS / f"{name}.service").read_text().splitlines():
            if "=" in line and not line.startswith("#"):
                key, _, value = line.partition("=")
                self.setdefault(key, []).append(value)


def test_units_start_what_forky_up_starts() -> None:
    for daemon in (*local.DAEMONS, local.REST):
        words = _Unit(f"forky-{daemon}")["ExecStart"][0].split()
        assert words == [f"{_INSTALLED}/bin/python", *local.daemon_argv(daemon)[1:]]


@pytest.mark.parametrize("daemon", ["pager", "hostd"])
def test_machines_outlive_a_restart(daemon: str) -> None:
    unit = _Unit(f"forky-{daemon}")
    assert unit["KillMode"] == ["process"]
    assert unit["Restart"] == ["on-failure"]
    assert unit["PrivateMounts"] == ["no"]
    assert [key for key in _WITH_A_NAMESPACE if key in unit] == []
    for name in ("forky", "forky-hostd", "forky-controller"):
        assert "Requires" not in _Unit(name)  # which would stop it when what it needs is restarted
        assert "BindsTo" not in _Unit(name)


def test_qemu_may_do_what_it_must() -> None:
    unit = _Unit("forky-hostd")
    for directive in ("MemoryDenyWriteExecute", "RestrictRealtime", "RestrictNamespaces", "RestrictSUIDSGID"):
        assert directive not in unit
    denied = unit["CapabilityBoundingSet"][0]
    assert denied.startswith("~")
    needed = "SYS_ADMIN NET_ADMIN NET_RAW SYS_PTRACE SYS_NICE SYS_RESOURCE SYS_CHROOT MKNOD SETUID SETGID CHOWN KILL"
    assert not {f"CAP_{name}" for name in needed.split()} & set(denied[1:].split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_them(tmp_path: Path) -> None:
    for unit in UNITS.glob("*.service"):
        here = unit.read_text().replace(_INSTALLED, str(Path(sys.executable).parents[1]))
        (tmp_path / unit.name).write_text(here)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, tmp_path.glob("*.service"))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    ours = [line for line in done.stderr.splitlines() if "forky" in line]
    assert (done.returncode, ours) == (0, [])


async def test_systemd_is_told_when_a_daemon_serves() -> None:
    with home() as settings, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(settings.home / "notify"))
        manager.settimeout(60)
        child = await asyncio.create_subprocess_exec(
            *local.daemon_argv("controller"),
            env={**os.environ, "FORKY_HOME": str(settings.home), "NOTIFY_SOCKET": str(settings.home / "notify")},
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            assert await asyncio.to_thread(manager.recv, 100) == b"READY=1"
            assert settings.socket("controller").exists()
        finally:
            child.terminate()
            await child.wait()
