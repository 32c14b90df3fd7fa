"""The probe guest's machine code: probe_guest.S beside this file, assembled.

The bytes are kept so that a host needs no assembler. `assemble` is for whoever changes the source, and for the test
that holds the two together; it prints nothing and leaves nothing.
"""

import base64
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".S")
READY = b"forky-probe: ready"

_ASSEMBLER_TIMEOUT_S = 10.0  # it takes milliseconds

MULTIBOOT_IMAGE = base64.b64decode(
    "ArCtGwAAAQD+T1HkAAAQAAAAEAA0AhAAAIAgACAAEAD6/LwAgCAAvsoBEADobgAAAL8AACAAMcC5ABQAAPOrxwUAACAAAxAgAMcFABAgAAMgIADH"
    "BQAgIACDAAAAxwUIICAAgwAgAA8g4IPIIA8i4LgAACAADyLYuYAAAMAPMg0AAQAADzAPIMANAAAAgA8iwA8BFZABEADquQAQAAgAZrr4A6yEwHQD"
    "7uv4w2a6+AOshMB0A+7r+MO4EAAAAI7YjsCO0L7nARAA6N7///8xwA+iuFcBEAC/4DAgAOhkAAAAuGgBEAC/ADIgAOhVAAAADwEcJZYBEADHBCUA"
    "AGAAa3JvZoE8JQAAYABrcm9mdTK+/wEQAOiS////vqABEABmrWaJwqzuZoXSdfT79IM8JQBAIAADcvX6viACEADoav////Tr/WaJB8dHAggAAI7B"
    "6BBmiUcGw8cEJRggIACDAGAASIPECEjPUP8EJQBAIACwIOYgWEjPkAAAAAAAAAAA//8AAACarwD//wAAAJLPABcAeAEQAA8CADAgAAAAAAAgABGg"
    "ABEhACChACghAAShAAIhAAGhAAEhAP6hAP9DADRAAKlAAAQAAABmb3JreS1wcm9iZTogcHJvdGVjdGVkIG1vZGUKAGZvcmt5LXByb2JlOiBsb25n"
    "IG1vZGUKAGZvcmt5LXByb2JlOiBwYWdlIGZhdWx0IGhhbmRsZWQKAGZvcmt5LXByb2JlOiByZWFkeQoA"
)


def assemble() -> bytes:
    """The flat image made from SOURCE by binutils' `as` and `ld`; subprocess errors when they fail or are missing."""
    with tempfile.TemporaryDirectory(prefix="forky-probe-") as directory:
        made, image = Path(directory) / "guest.o", Path(directory) / "guest"
        for command in (
            ["as", "--64", "-o", str(made), str(SOURCE)],
            ["ld", "-Ttext=0x100000", "-e", "0x100000", "--oformat", "binary", "-o", str(image), str(made)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=_ASSEMBLER_TIMEOUT_S)
        return image.read_bytes()
