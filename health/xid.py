"""What NVIDIA's XID numbers ask for, and the recovery action that the driver itself names. Data, and how to read it.

Grouped from NVIDIA's catalog of XID errors of October 2025; meanings are in our own words. A number that is not in the
table is only noted: new drivers bring new ones, and what is unknown evicts nobody.
"""

from __future__ import annotations

import enum


class XidAction(enum.StrEnum):
    """What a number asks for."""

    EVICT = "evict"
    RESET = "reset"
    WORKFLOW = "workflow"
    RESTART = "restart"
    LOG = "log"
    OPERATOR = "operator"
    COMPANION = "companion"
    NAMED = "named"


class Recovery(enum.IntEnum):
    """The driver's own word on what a GPU needs (NVML field 230)."""

    NONE = 0
    GPU_RESET = 1
    NODE_REBOOT = 2
    DRAIN_P2P = 3
    DRAIN_AND_RESET = 4
    RECOVER_IMEX_DOMAIN = 5
    BUS_RESET = 6
    SYSTEM_REBOOT = 7


RECOVERY_WORDS: dict[int, str] = {
    Recovery.NONE: "nothing",
    Recovery.GPU_RESET: "a reset of the GPU",
    Recovery.NODE_REBOOT: "a reboot of the node",
    Recovery.DRAIN_P2P: "an end of all traffic between it and its peers",
    Recovery.DRAIN_AND_RESET: "to be drained and then reset",
    Recovery.RECOVER_IMEX_DOMAIN: "a recovery of the domain in which nodes share memory (IMEX)",
    Recovery.BUS_RESET: "a reset of its PCIe bus",
    Recovery.SYSTEM_REBOOT: "a reboot of the whole system",
}

COMPANION = 45
CONTAINED = 94
NAMES_ACTION = 154

_GROUPS: dict[XidAction, tuple[range | int, ...]] = {
    XidAction.EVICT: (79, 151),
    XidAction.RESET: (46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),
    XidAction.WORKFLOW: (48, 54, 74, range(144, 151)),
    XidAction.RESTART: (
        8, 11, 13, 25, 31, 32, range(39, 42), 60, range(68, 73), range(75, 78), 80, range(82, 87), 88, 89, CONTAINED,
        range(96, 106), range(126, 136), 139,
    ),
    XidAction.LOG: (
        14, 37, 38, 43, 44, 63, 66, 67, 92, 93, range(106, 109), 121, 137, 141, 152, 153, 157, 160, 161,
    ),
    XidAction.OPERATOR: (78, 159, range(162, 173)),
    XidAction.COMPANION: (COMPANION,),
    XidAction.NAMED: (NAMES_ACTION,),
}  # fmt: skip

_MEANINGS = {
    8: "the GPU no longer takes work from one of its queues",
    13: "a kernel broke a rule of the graphics engine: a bad address or instruction, of the program or of the GPU",
    31: "a kernel touched memory that is not mapped, most often an error of the program",
    32: "a command buffer is damaged, on its way over PCIe or by the program",
    38: "the GPU's firmware reports a fault of the driver",
    43: "the GPU stopped one program's work after that program's own error",
    44: "the graphics engine reported a fault in a context switch",
    45: "work was cleaned away after another error, or because its program was killed",
    46: "the GPU stopped processing",
    48: "an ECC error that could not be corrected (two bits)",
    54: "an auxiliary power cable is missing or loose",
    62: "the GPU's microcontroller halted",
    63: "a row of memory was marked for remapping",
    64: "a row of memory could not be remapped",
    74: "an NVLink failed, or its other end did",
    78: "a virtual GPU could not be started",
    79: "the GPU has fallen off the bus: it can no longer be reached",
    92: "single-bit ECC errors come at a high rate",
    94: "an ECC error that could not be corrected, held to one program",
    95: "an ECC error that could not be corrected and could not be held to one program",
    109: "a switch of contexts did not end in time",
    110: "the security engine met a fault",
    119: "the GPU's system processor did not answer the driver in time",
    120: "the GPU's system processor met an error",
    121: "the link between GPU and CPU corrected an error",
    136: "an NVLink could not be trained",
    137: "an access over NVLink lacked the permission for it, most often after a peer's error",
    140: "an ECC error that the driver could not recover from",
    143: "the GPU could not be initialised",
    151: "an encryption key could not be rotated",
    154: "the driver changed its mind about what the GPU needs",
    155: "an NVLink went down",
    156: "a part of the GPU is to be taken out of use",
    157: "a broken part of the GPU cannot be taken out of use: no spare part is left",
    158: "a time-out that the GPU cannot recover from",
}

_ACTION = {
    number: action
    for action, group in _GROUPS.items()
    for part in group
    for number in (part if isinstance(part, range) else (part,))
}


def action_of(xid: int) -> XidAction | None:
    """What this number asks for; None if the table does not know it."""
    return _ACTION.get(xid)


def known_xids() -> tuple[int, ...]:
    """All numbers in the table, rising."""
    return tuple(sorted(_ACTION))


def meaning_of(xid: int) -> str:
    """The number in words; "" for the less important ones."""
    return _MEANINGS.get(xid, "")


def recovery_of(value: int | None) -> Recovery | None:
    """The driver's recovery action; None where the driver does not say or says something newer than this table."""
    return None if value is None or value not in RECOVERY_WORDS else Recovery(value)
