"""Where a daemon may listen for whoever comes."""

import ipaddress


def loopback(text: str) -> tuple[str, int]:
    """HOST:PORT on this computer's loopback. Raises ValueError, with what to write instead."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"«{text}» is not HOST:PORT: write 127.0.0.1:9464, for example")
    if host == "localhost":
        return "127.0.0.1", int(port)
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError as error:
        raise ValueError(f"«{host}» is not an address: write 127.0.0.1:{port}") from error
    if not is_loopback:
        raise ValueError(
            f"«{text}» would show what runs here to the network, unencrypted: use 127.0.0.1:{port}, or the REST API's "
            "/v1/metrics, which has TLS"
        )
    return host, int(port)
