"""Packages for an image, by the host's own apt: where they come from, the ones that are installed in the image's root,
and single ones that are only fetched.

A Debian 12 host's own sources are used, so its mirror is; any other host gets Debian's default ones.
"""

import re
from collections.abc import Callable
from pathlib import Path

from forkypig.errors import InternalError
from forkypig.images import recipe
from forkypig.images.commands import clean_environment, run

_INSTALL_LIMIT_S = 1800.0  # 40 s beside a mirror; a slow line may take minutes for 60 MB
_DOWNLOAD_LIMIT_S = 1800.0
_QUERY_LIMIT_S = 60.0

# From the host's apt: how it reaches a mirror and what it thinks of that one's age. All else is the image's.
_HOST_OPTION = re.compile(
    r"Acquire::(?:(?:http|https|ftp)::[\w:.\-/]+|Check-Valid-Until|Check-Date|Retries|ForceIPv[46]) \"[^\"]+\";"
)
_MERGED_USR = Path("/usr/share/mmdebstrap/hooks/merged-usr")  # spares the image usrmerge, and with it all of Perl
_INDEX_FORMAT = "$(ORIGIN)|$(CODENAME)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)"


async def host_options() -> list[str]:
    """The host's apt options that an image's apt needs to reach the mirror too, one per line of an apt.conf."""
    output = await run("apt's options could not be read", ["apt-config", "dump"], deadline_s=_QUERY_LIMIT_S)
    return [line for line in output.splitlines() if _HOST_OPTION.fullmatch(line)]


async def host_sources() -> list[str]:
    """The host's sources of Debian 12 as sources.list lines; none on another system."""
    output = await run(
        "apt's sources could not be read",
        ["apt-get", "indextargets", "--format", _INDEX_FORMAT, "Created-By: Packages"],
        deadline_s=_QUERY_LIMIT_S,
    )
    return sources_from(output)


def sources_from(index_targets: str) -> list[str]:
    """What `apt-get indextargets` said as sources.list lines: Debian's own of the image's suite, if the suite itself is
    among them."""
    lines: dict[str, str] = {}
    suites = {recipe.SUITE, f"{recipe.SUITE}-updates", f"{recipe.SUITE}-security"}
    for line in index_targets.splitlines():
        fields = line.split("|")
        if len(fields) == 6 and fields[0] == "Debian" and fields[1] in suites and fields[4] == "main":
            _, codename, uri, release, component, key = fields
            # apt leaves the field as it is when the source has none.
            signed_by = key if key.startswith("/") else str(recipe.KEYRING)
            lines[f"{codename} {uri}"] = f"deb [signed-by={signed_by}] {uri} {release} {component}"
    if not any(key.startswith(f"{recipe.SUITE} ") for key in lines):
        return []
    return list(lines.values())


async def install_root(root: Path, on_line: Callable[[str], None]) -> None:
    """Makes a Debian root directory with the recipe's packages. apt's lists stay in it, for `fetch`. Runs as root."""
    sources = await host_sources()
    arguments = [
        *("mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase", "--verbose", "--skip=cleanup/apt"),
        f"--architectures={recipe.ARCHITECTURE}",
        f"--include={','.join(recipe.PACKAGES)}",
        # Nothing of a build that breaks is used, so nothing needs to reach the disk file by file: spares 10 s.
        "--dpkgopt=force-unsafe-io",
        '--aptopt=Acquire::Languages "none";',
        *(f"--aptopt={option}" for option in await host_options()),
    ]
    if _MERGED_USR.is_dir():
        arguments.append(f"--hook-dir={_MERGED_USR}")
    arguments += [recipe.SUITE, str(root), *(["-"] if sources else [])]
    await run(
        "packages could not be installed",
        arguments,
        deadline_s=_INSTALL_LIMIT_S,
        on_line=on_line,
        stdin="".join(f"{line}\n" for line in sources).encode(),
    )


async def fetch(root: Path, directory: Path) -> tuple[Path, Path]:
    """Downloads the kernel's package and that of the initramfs's busybox, with the lists that `install_root` left, into
    `directory`; returns their paths in that order."""
    configuration = directory / "apt.conf"
    configuration.write_text(
        f'Dir "{root}";\nDir::State::status "{root}/var/lib/dpkg/status";\n'
        f'APT::Architecture "{recipe.ARCHITECTURE}";\nAPT::Architectures {{ "{recipe.ARCHITECTURE}"; }};\n'
        # apt's own user can't write to a directory of root's.
        'APT::Sandbox::User "root";\n'
    )
    environment = {**clean_environment(), "APT_CONFIG": str(configuration)}
    what = "the kernel could not be downloaded"
    words = await run(
        what,
        ["apt-cache", "depends", "--important", recipe.KERNEL_PACKAGE],
        deadline_s=_QUERY_LIMIT_S,
        environment=environment,
    )
    kernel = re.search(r"Depends: (linux-image-[0-9][\w.+-]*)", words)
    if kernel is None:
        raise InternalError(f"{recipe.KERNEL_PACKAGE} depends on no kernel: {words!r}")
    await run(
        what,
        ["apt-get", "download", kernel[1], recipe.INITRAMFS_PACKAGE],
        deadline_s=_DOWNLOAD_LIMIT_S,
        environment=environment,
        directory=directory,
    )
    return _only(directory, f"{kernel[1]}_*.deb"), _only(directory, f"{recipe.INITRAMFS_PACKAGE}_*.deb")


def _only(directory: Path, pattern: str) -> Path:
    found = list(directory.glob(pattern))
    if len(found) != 1:
        raise InternalError(f"apt downloaded {len(found)} files like {pattern}")
    return found[0]
