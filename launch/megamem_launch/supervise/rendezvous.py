"""Where the ranks of an incarnation meet: an address that every node reaches, and a port of its own."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from megamem.errors import LaunchError
from megamem_launch.supervise.incarnation import Incarnation

_FIRST, _JOBS, _PORTS = 12000, 2000, 8  # 12000 to 27999: below the ports that systems hand out by themselves


def ports(incarnation: Incarnation) -> list[int]:
    """The ports that an incarnation may use, its own first.

    Jobs that share a node have no port in common unless their numbers are 2000 apart, and starts that follow each other do not
    meet ports that the system still keeps for the one before.
    """
    number = sum(int(part) for part in incarnation.job.removeprefix("local-").split("-"))
    turn = incarnation.restart + incarnation.attempt
    return [_FIRST + number % _JOBS * _PORTS + (turn + offset) % _PORTS for offset in range(_PORTS)]


def free_port(incarnation: Incarnation) -> int:
    """The first of :func:`ports` that nobody on this host listens at."""
    for port in ports(incarnation):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise LaunchError(
        f"no port of {min(ports(incarnation))} to {max(ports(incarnation))} is free on {socket.gethostname()}; end the "
        "processes that listen there"
    )


def address_of(node: str, node_address: Callable[[str], str]) -> str:
    """An IP address of ``node`` that others reach.

    ``node_address`` gives what SLURM knows the node by: names need not resolve where the ranks run (in containers they often do
    not), and many hosts give their own name a loopback address. A loopback address is taken only where there is no other.
    """
    found = _resolve(node)
    if not any(not ipaddress.ip_address(ip).is_loopback for ip in found):
        found += _resolve(node_address(node))
    if not found:
        raise LaunchError(
            f"node {node} has no address: its name does not resolve here, nor does NodeAddr of `scontrol show node {node}`; "
            "enter the nodes in DNS or /etc/hosts"
        )
    return next((ip for ip in found if not ipaddress.ip_address(ip).is_loopback), found[0])


def _resolve(name: str) -> list[str]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name else []
    except OSError:
        return []
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # a colon in an address confuses host:port
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))
