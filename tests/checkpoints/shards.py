"""How a checkpoint is cut into files: as its real index says, or by the published count or size."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .catalogue import Entry
    from .tensors import Tensor


def cut(tensors: Sequence[Tensor], entry: Entry) -> dict[str, list[Tensor]]:
    """Shards in checkpoint order: a layer each, the published number of about equal bytes, or files of up to 5 GB."""
    sizes = [tensor.nbytes for tensor in tensors]
    groups: list[list[Tensor]] = []
    if entry.by_layer:
        layer = 0
        for tensor in tensors:
            if found := re.match(r"model\.layers\.(\d+)\.", tensor.name):
                layer = int(found[1])
            groups += [[] for _ in range(layer + 1 - len(groups))]
            groups[layer].append(tensor)
    elif entry.shards is None:
        room = 0
        for tensor, size in zip(tensors, sizes, strict=True):
            if not groups or size > room:
                groups.append([])
                room = 5_000_000_000
            groups[-1].append(tensor)
            room -= size
    else:
        total, done = sum(sizes), 0
        groups = [[] for _ in range(entry.shards)]
        for tensor, size in zip(tensors, sizes, strict=True):
            groups[min((done + size // 2) * entry.shards // total, entry.shards - 1)].append(tensor)
            done += size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    last = len(groups) - 1 + entry.first
    return {entry.pattern.format(i + entry.first, last): group for i, group in enumerate(groups)}


def by_index(name: str, tensors: Sequence[Tensor], index: bytes) -> dict[str, list[Tensor]]:
    """Shards as the real index says; names that differ from the rules' are an error."""
    weight_map: dict[str, str] = json.loads(index)["weight_map"]
    known = {tensor.name: tensor for tensor in tensors}
    if known.keys() != weight_map.keys():
        missing, extra = weight_map.keys() - known.keys(), known.keys() - weight_map.keys()
        raise ValueError(f"{name}: index has {sorted(missing)[:3]} more, the rules have {sorted(extra)[:3]} more")
    shards: dict[str, list[Tensor]] = {shard: [] for shard in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        shards[shard].append(known[tensor])
    return shards
