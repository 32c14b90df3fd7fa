"""The probe guest's bytes are those of its source."""

import shutil

import pytest

from forkypig.qemu import probe_guest


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("ld") is None, reason="binutils is not installed")
def test_the_bytes_are_the_assembled_source() -> None:
    assert probe_guest.assemble() == probe_guest.MULTIBOOT_IMAGE
