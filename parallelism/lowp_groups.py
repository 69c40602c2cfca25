"""Groups of rows padded to what a grouped product can take, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def padded(x: Tensor, offsets: Tensor, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of [T, C], each group filled up with zeros.

    offsets: where each group ends in x; rows behind the last one are of no group, and left out.

    Returns:
        The rows, where the groups end now, and for each row of a group in x its new place. How many rows there are is
        the same for the same shapes, so that the host need not wait for the device.
    """
    dtype, offsets = offsets.dtype, offsets.long()
    counts = offsets.diff(prepend=offsets.new_zeros(1))
    ends = ((counts + multiple - 1) // multiple * multiple).cumsum(0)
    rows = torch.arange(len(x), device=x.device)
    group = torch.searchsorted(offsets, rows, right=True)
    most = len(x) + multiple * len(offsets)
    shift = ends - offsets - (ends.diff(prepend=ends.new_zeros(1)) - counts)
    # Rows of no group go where no group is.
    places = torch.where(group < len(offsets), rows + shift[group.clamp(max=len(offsets) - 1)], most)
    return x.new_zeros(most + 1, x.shape[1]).index_put((places,), x), ends.to(dtype), places
