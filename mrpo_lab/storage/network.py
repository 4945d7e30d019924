"""Whether a server can be reached."""

import socket
from urllib.parse import urlsplit

TIMEOUT = 5.0
"""Seconds to wait for a connection."""


def connection_error(url: str) -> OSError | None:
    """Open and close a TCP connection to the server of ``url``: the error, or None if it worked.

    Proxies are not considered.
    """
    server = urlsplit(url)
    port = server.port or {"http": 80}.get(server.scheme, 443)
    try:
        socket.create_connection((server.hostname or "", port), timeout=TIMEOUT).close()
    except OSError as error:
        return error
    return None
