"""What several processes have computed of their clips, put together as if one had."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as process_group
from torch import Tensor

Share = tuple[Sequence[str], Tensor]  # ids of n clips, and what each has (n, ...)


def gather_by_id(ids: Sequence[str], features: Tensor) -> tuple[list[str], Tensor]:
    """All processes' clips in the order of their ids, on each of them, on the CPU: (ids, features (N, ...)).

    ids of this process's clips, features (n, ...) of one trailing shape and dtype everywhere; n may be 0, and differ.
    Give each clip to one process, as ids[rank::world] does. All processes must call it; one alone may too.
    Raises as `merge_by_id`, in all processes alike.
    """
    mine: Share = (list(ids), features.detach().cpu().clone())  # of a view, all that it looks at would be sent
    if not (process_group.is_available() and process_group.is_initialized()):
        return merge_by_id([mine])
    shares: list[Share] = [mine] * process_group.get_world_size()
    process_group.all_gather_object(shares, mine)
    return merge_by_id(shares)


def merge_by_id(shares: Sequence[Share]) -> tuple[list[str], Tensor]:
    """One set of the shares, sorted by id: the same however the clips were shared out.

    A clip that is in twice, as a sampler that pads its shares has it, counts once. Raises ValueError where its features
    differ between the two, and where ids and features, or the shapes and dtypes of shares, do not match.
    """
    kinds = {(features.shape[1:], features.dtype) for ids, features in shares if ids}
    if len(kinds) > 1:
        raise ValueError(f"the features of shares differ in shape or dtype: {sorted(map(str, kinds))}")
    found: dict[str, Tensor] = {}
    for ids, features in shares:
        if len(ids) != len(features):
            raise ValueError(f"there are {len(ids)} ids for {len(features)} features")
        for one, feature in zip(ids, features, strict=True):
            if one in found and not torch.equal(found[one], feature):
                raise ValueError(
                    f"clip {one} has two different features; give each clip to one process, by ids[rank::world]"
                )
            found[one] = feature
    if not found:
        return [], shares[0][1]
    ordered = sorted(found)
    return ordered, torch.stack([found[one] for one in ordered])
