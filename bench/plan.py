"""How long work takes on so many workers: of what is ready, the item with the longest chain behind it goes first."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A piece of work: its key, its seconds on one worker, and the keys of what must be done first."""

    key: str
    seconds: float
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """How long items take on some workers.

    Attributes:
        makespan: seconds until the last is done.
        efficiency: share of the workers' time that is work.
        chain: keys of the longest chain of needs.
        limit: in words, what keeps it from being faster.
    """

    makespan: float
    efficiency: float
    chain: tuple[str, ...]
    limit: str


def tails(items: Sequence[Item]) -> dict[str, float]:
    """Seconds from the beginning of each item to the end of the longest chain that waits for it."""
    order, later = _in_order(items), _waiting(items)
    own, found = {item.key: item.seconds for item in items}, dict[str, float]()
    for key in reversed(order):
        found[key] = own[key] + max((found[other] for other in later[key]), default=0.0)
    return found


def _in_order(items: Sequence[Item]) -> list[str]:
    """Keys, needs first.

    Raises:
        ValueError: for needs in a circle, or needs that are no items.
    """
    left, later = {item.key: set(item.needs) for item in items}, _waiting(items)
    order: list[str] = []
    ready = [key for key, needs in left.items() if not needs]
    while ready:
        order.append(key := ready.pop())
        for other in later[key]:
            left[other].discard(key)
            if not left[other]:
                ready.append(other)
    if len(order) < len(items):
        unknown = later.keys() - left.keys()
        raise ValueError(f"needs that can never be met: {sorted(unknown) or sorted(left.keys() - set(order))}")
    return order


def _waiting(items: Sequence[Item]) -> dict[str, list[str]]:
    """Keys of what waits for each."""
    found: dict[str, list[str]] = {item.key: [] for item in items}
    for item in items:
        for need in item.needs:
            found.setdefault(need, []).append(item.key)
    return found


def schedule(items: Sequence[Item], workers: int) -> Schedule:
    """Give every free worker, of what is ready, the item with the longest chain behind it (critical path list scheduling)."""
    if not items:
        return Schedule(0.0, 1.0, (), "nothing to do")
    tail, left = tails(items), {item.key: len(item.needs) for item in items}
    own, later = {item.key: item for item in items}, _waiting(items)
    ready = [(-tail[key], key) for key, count in left.items() if not count]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < workers:
            key = heapq.heappop(ready)[1]
            heapq.heappush(running, (now + own[key].seconds, key))
        now, done = heapq.heappop(running)
        for other in later[done]:
            left[other] -= 1
            if not left[other]:
                heapq.heappush(ready, (-tail[other], other))
    work = sum(item.seconds for item in items)
    chain = _chain(own, tail, later)
    longest = tail[chain[0]]
    if longest > 0.9 * now:
        limit = f"the longest chain of needs, {duration(longest)}: {' -> '.join(chain)}"
    else:
        limit = f"the work itself, {duration(work)} in all"
    return Schedule(now, work / (workers * now) if now else 1.0, chain, limit)


def _chain(own: Mapping[str, Item], tail: Mapping[str, float], later: Mapping[str, list[str]]) -> tuple[str, ...]:
    first = max((key for key, item in own.items() if not item.needs), key=lambda key: tail[key])
    chain = [first]
    while later[chain[-1]]:
        chain.append(max(later[chain[-1]], key=lambda key: tail[key]))
    return tuple(chain)


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
