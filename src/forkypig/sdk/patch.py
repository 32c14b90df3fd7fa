"""What changed in a file, as git writes it, so that `git apply` and readers of patches understand it. Pure."""

import difflib

from forkypig.sdk.file_list import FileEntry

LARGEST_BYTES = 1 << 20  # of a file whose lines are compared
_GIT_KINDS = {"file": 0o100000, "link": 0o120000}  # what git keeps


def patch(path: str, before: FileEntry | None, after: FileEntry | None, old: bytes | None, new: bytes | None) -> str:
    """The change of one file from `before` to `after`, None where it is not there; "" for what git does not keep, which
    is directories and devices, and owners and times of all.

    `old` and `new`: the contents, a link's target for a link, None for what is not there or too long."""
    if (before or after) is None or any(each is not None and each.kind not in _GIT_KINDS for each in (before, after)):
        return ""
    if before is not None and after is not None and before.kind != after.kind:  # git has it as two changes
        return patch(path, before, None, old, None) + patch(path, None, after, None, new)
    lines = _headers(path, before, after)
    if old is not None and old == new:
        return "".join(lines) if len(lines) > 1 else ""
    was, now = f"a{path}" if before else "/dev/null", f"b{path}" if after else "/dev/null"
    if _is_text(before, old) and _is_text(after, new):
        lines += _differences(was, now, old or b"", new or b"")
    else:
        lines.append(f"Binary files {was} and {now} differ\n")
    return "".join(lines)


def _headers(path: str, before: FileEntry | None, after: FileEntry | None) -> list[str]:
    lines = [f"diff --git a{path} b{path}\n"]
    if before is None and after is not None:
        lines.append(f"new file mode {_mode(after)}\n")
    elif after is None and before is not None:
        lines.append(f"deleted file mode {_mode(before)}\n")
    elif before is not None and after is not None and _mode(before) != _mode(after):
        lines += [f"old mode {_mode(before)}\n", f"new mode {_mode(after)}\n"]
    return lines


def _mode(entry: FileEntry) -> str:
    permissions = 0 if entry.kind == "link" else entry.mode & 0o777
    return f"{_GIT_KINDS[entry.kind] | permissions:06o}"


def _is_text(entry: FileEntry | None, content: bytes | None) -> bool:
    return entry is None or (content is not None and b"\0" not in content)


def _differences(was: str, now: str, old: bytes, new: bytes) -> list[str]:
    # Lines end with \n and with nothing else: str.splitlines knows more ends than a patch does.
    before, after = (_lines(content.decode(errors="replace")) for content in (old, new))
    lines = difflib.unified_diff(before, after, was, now)
    return [line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines]


def _lines(text: str) -> list[str]:
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1][:-1]
    return lines if lines[-1] else lines[:-1]
