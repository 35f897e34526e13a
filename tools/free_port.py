"""A port of this host that nobody has, for servers and launchers that must be told one."""

from __future__ import annotations

import socket


def free_port() -> int:
    """It may be taken again before it is used: the caller comes soon."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
