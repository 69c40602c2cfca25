"""A log of sends and receipts between pipeline stages, which torch's flight recorder has for NCCL and not for gloo."""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from trainer.flight import PeerOp


@dataclass(frozen=True, slots=True)
class _Logged:
    group: str
    sends: bool
    peer: int
    number: int
    sizes: tuple[int, ...]
    # Weak: a log must not keep tensors alive, which the work does.
    work: weakref.ref[dist.Work]


class PeerLog:
    """The newest `limit` operations. Costs a few microseconds each; nothing where there is no pipeline."""

    def __init__(self, limit: int) -> None:
        self._logged: deque[_Logged] = deque(maxlen=limit)
        self._counts: dict[tuple[str, bool, int], int] = defaultdict(int)

    def install(self) -> None:
        """Have torch's isend and irecv write into this log, for all that this process does from now on.

        torch has no hook for it. Both names of each function are replaced, since torch compares them by identity.
        """
        for name in ("isend", "irecv"):
            logged = self._logging(getattr(c10d, name), sends=name == "isend")
            setattr(c10d, name, logged)
            setattr(dist, name, logged)

    def _logging(self, inner: Callable[..., dist.Work | None], sends: bool) -> Callable[..., dist.Work | None]:
        def call(
            tensor: torch.Tensor,
            peer: int | None = None,
            group: dist.ProcessGroup | None = None,
            tag: int = 0,
            group_peer: int | None = None,
            **named: int | None,
        ) -> dist.Work | None:
            peer = named.pop("dst" if sends else "src", peer)
            group_peer = named.pop("group_dst" if sends else "group_src", group_peer)
            work = inner(tensor, peer, group, tag, group_peer, **named)
            if work is not None and (peer is not None or group_peer is not None):
                self._note(tensor, peer, group, group_peer, sends, work)
            return work

        return call

    def _note(
        self,
        tensor: torch.Tensor,
        peer: int | None,
        group: dist.ProcessGroup | None,
        group_peer: int | None,
        sends: bool,
        work: dist.Work,
    ) -> None:
        where = group if group is not None else dist.group.WORLD
        assert where is not None
        if peer is None:
            assert group_peer is not None
            peer = dist.get_global_rank(where, group_peer)
        key = (where.group_name, sends, peer)
        self._counts[key] += 1
        self._logged.append(_Logged(*key, self._counts[key], tuple(tensor.shape), weakref.ref(work)))

    def ops(self) -> tuple[PeerOp, ...]:
        """What is logged, oldest first."""
        return tuple(
            PeerOp(each.group, each.sends, each.peer, each.number, _over(each.work()), each.sizes)
            for each in list(self._logged)
        )


def _over(work: dist.Work | None) -> bool:
    return work is None or work.is_completed()
