"""Builds the default image into .cache/images, once for all tests of this checkout; does nothing when it is there."""

import asyncio
import sys
import time
from pathlib import Path

from forkypig.errors import ForkyError
from forkypig.images.debian import build_default
from forkypig.images.store import ImageStore
from forkypig.model import Progress

CACHE = Path(__file__).resolve().parents[1] / ".cache/images"


class Lines:
    """Progress as plain lines, one a step, for terminals and CI logs alike."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._step = ""

    def __call__(self, progress: Progress) -> None:
        """Prints a step when it begins."""
        if progress.step != self._step:
            self._step = progress.step
            print(f"[image] {time.monotonic() - self._started_s:5.1f} s  {progress.step}", flush=True)


def main() -> int:
    """0 when the image is there."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        image = asyncio.run(build_default(ImageStore(CACHE), progress=Lines()))
    except ForkyError as error:
        print(f"[image] {error}", file=sys.stderr)
        return 1
    for old in ImageStore(CACHE).list()[:-2]:  # of other versions of the agent; each takes 190 MB
        if old.id != image.id:
            ImageStore(CACHE).remove(old.id)
    print(f"[image] {image.name} {image.id}: {image.size_bytes >> 20} MiB, kernel {image.kernel}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
