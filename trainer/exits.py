"""Exit codes: a contract between workers, agents, the supervisor and schedulers."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a process' exit tells the one that started it."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    REQUEUE = 75
    DO_NOT_RESTART = 93
    BAD_NODE = 94
