"""Promise: a node publishes an address that others can reach, or says why it has none."""

from __future__ import annotations

import socket

import msgspec
import psutil
import pytest

from cluster.addresses import interface_of, own_address
from configs.schema import ClusterConfig

SLURM = ClusterConfig(backend="slurm")


def test_on_one_machine_nobody_else_is_let_in() -> None:
    """`local` stays on the loopback, whatever the host is called."""
    assert own_address(ClusterConfig(), "no.such.host.invalid") == "127.0.0.1"


def test_a_named_interface_gives_its_address() -> None:
    """And an address leads back to its interface."""
    address = own_address(msgspec.structs.replace(SLURM, interface="lo"), "ignored")
    assert address == "127.0.0.1"
    assert interface_of(address) == "lo"
    assert interface_of("203.0.113.1") == ""


def test_a_wrong_interface_is_told_with_those_there_are() -> None:
    """The message names the key, the value and the choice."""
    with pytest.raises(ValueError, match=r"cluster\.interface = 'ib7': this node has only .*lo"):
        own_address(msgspec.structs.replace(SLURM, interface="ib7"), "ignored")


@pytest.mark.parametrize(("name", "said"), [("localhost", "this host only"), ("no.such.host.invalid", "no address")])
def test_a_name_that_leads_nowhere_is_refused(name: str, said: str) -> None:
    """The loopback would have all the other nodes talk to themselves."""
    with pytest.raises(ValueError, match=rf"{said}.*set cluster\.interface"):
        own_address(SLURM, name)


def test_a_host_name_gives_its_address() -> None:
    """The name is looked up as the other nodes would."""
    outside = [
        entry.address
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    if not outside:
        pytest.skip("this machine has the loopback only")
    assert own_address(SLURM, outside[0]) == outside[0]
