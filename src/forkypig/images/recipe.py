"""What the default image is made of. Whatever changes here makes another image: raise VERSION when the code that
builds changes what comes out."""

import hashlib
import json
from pathlib import Path

from forkypig.errors import InternalError

VERSION = 2
SUITE = "bookworm"
ARCHITECTURE = "amd64"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

PACKAGES = (
    *("python3", "iproute2", "e2fsprogs", "ca-certificates", "procps"),
    *("kmod", "less", "iputils-ping"),
)
KERNEL_PACKAGE = "linux-image-amd64"  # depends on the generic kernel, which has CONFIG_VMGENID; the cloud one has not
INITRAMFS_PACKAGE = "busybox-static"

# console, panic: we see its words, and QEMU ends with it. quiet: a serial line costs 0.1 ms a character under TCG.
# net.ifnames: the card is eth0. cryptomgr.notests: 0.6 s of self-tests of the kernel's ciphers at every boot under TCG.
# no_timer_check, tsc=reliable: guests' timers need no proof, and a stall of the host must not make the kernel drop the
# TSC. Mitigations stay on: under KVM they protect one program of a guest from another.
CMDLINE = (
    "console=ttyS0 quiet loglevel=4 panic=-1 root=/dev/vda rw net.ifnames=0 random.trust_cpu=on "
    "cryptomgr.notests no_timer_check tsc=reliable"
)

AGENT_SOURCE = "/usr/lib/forky/agent.py"
AGENT = "/usr/lib/forky/agent.pyc"  # compiled in the image: compiling 1400 lines took 0.5 s under TCG
# -I -S: neither the environment nor site-packages may break it. -B: it writes nothing to the disk that it is to fork.
INIT = ("/usr/bin/python3", "-I", "-S", "-B", AGENT, "--init")

# What nobody reads in a machine that lives for minutes; copyright files stay.
UNWANTED = ("usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian", "usr/share/bug")

DISK_RESERVE = 1.2  # of what is in it; a guest on a larger overlay grows it
DISK_STEP_MIB = 64


def agent_source() -> bytes:
    """The guest's agent as it is shipped; InternalError when the installation lacks it."""
    path = Path(__file__).parents[1] / "agent" / "agent.py"
    try:
        return path.read_bytes()
    except OSError as error:
        raise InternalError(f"the installation lacks {path}: install Forky Pig again") from error


def digest(agent: bytes) -> str:
    """Stands for everything that decides what is built, but for the versions of packages. 64 hex digits."""
    settings = {
        "version": VERSION,
        "suite": SUITE,
        "architecture": ARCHITECTURE,
        "packages": PACKAGES,
        "kernel": KERNEL_PACKAGE,
        "initramfs": INITRAMFS_PACKAGE,
        "cmdline": CMDLINE,
        "init": INIT,
        "agent": hashlib.sha256(agent).hexdigest(),
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
