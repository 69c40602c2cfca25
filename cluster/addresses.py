"""Under which address the other nodes of a job reach this one."""

from __future__ import annotations

import socket

import psutil

from configs.schema import ClusterConfig

LOOPBACK = "127.0.0.1"


def own_address(cluster: ClusterConfig, host_name: str) -> str:
    """The IPv4 address of the interface that the configuration names, else the one that host_name leads to.

    On `local`, unless an interface is named, all nodes are on this machine and nobody else shall reach them.

    Raises:
        ValueError: if there is no such interface, it has no address, or the name leads nowhere or to this host only.
    """
    if cluster.interface:
        return _of_interface(cluster.interface)
    if cluster.backend == "local":
        return LOOPBACK
    try:
        found = socket.gethostbyname(host_name)
    except OSError as error:
        raise ValueError(f"this host's name {host_name!r} has no address ({error}); set cluster.interface") from error
    if found.startswith("127."):
        raise ValueError(f"this host's name {host_name!r} leads to {found}, this host only; set cluster.interface")
    return found


def interface_of(address: str) -> str:
    """The name of the interface that has this IPv4 address: what gloo and NCCL want to know. "" if none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.family == socket.AF_INET and entry.address == address for entry in entries):
            return name
    return ""


def _of_interface(name: str) -> str:
    interfaces = psutil.net_if_addrs()
    if name not in interfaces:
        raise ValueError(f"cluster.interface = {name!r}: this node has only {', '.join(sorted(interfaces))}")
    for entry in interfaces[name]:
        if entry.family == socket.AF_INET:
            return str(entry.address)
    raise ValueError(f"cluster.interface = {name!r} has no IPv4 address on this node")
