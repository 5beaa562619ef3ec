"""Finds the partition of heads into groups of one size that loses least."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

Group = tuple[int, ...]
Loss = Callable[[Group], float]
EXACT = 8  # up to this many heads all partitions are tried: 105 into pairs, 35 into fours


def adjacent(heads: int, groups: int) -> list[Group]:
    """Return the groups of neighbouring heads."""
    size = heads // groups
    return [tuple(range(start, start + size)) for start in range(0, heads, size)]


def similar(heads: int, groups: int, loss: Loss) -> list[Group]:
    """Return the partition of least total loss: exact for pairs and up to 8 heads.

    Otherwise greedy, then improved by swaps, minimising the sum over pairs within groups.

    Args:
        heads: how many there are.
        groups: how many groups of equal size are wanted.
        loss: of a group, members ascending; called once for each.
    """
    size = heads // groups
    memory: dict[Group, float] = {}

    def known(group: Group) -> float:
        group = tuple(sorted(group))
        if group not in memory:
            memory[group] = loss(group)
        return memory[group]

    if size == 1 or groups == 1:
        return adjacent(heads, groups)
    neighbours = adjacent(heads, groups)
    if heads <= EXACT:
        best = min(_partitions(tuple(range(heads)), size), key=lambda parts: sum(map(known, parts)))
    elif size == 2:
        best = _matching(heads, known)
    else:

        def pairs(group: Group) -> float:
            return sum(known(pair) for pair in itertools.combinations(group, 2))

        starts = (_greedy(heads, size, pairs), list(neighbours))
        best = min((_swapped(start, pairs) for start in starts), key=lambda parts: sum(map(known, parts)))
    gain = sum(map(known, neighbours)) - sum(map(known, best))
    return sorted(tuple(sorted(group)) for group in best) if gain > 1e-12 else neighbours


def _partitions(heads: Group, size: int) -> Iterator[list[Group]]:
    if not heads:
        yield []
        return
    first, rest = heads[0], heads[1:]
    for others in itertools.combinations(rest, size - 1):
        left = tuple(h for h in rest if h not in others)
        yield from ([(first, *others), *more] for more in _partitions(left, size))


def _matching(heads: int, loss: Loss) -> list[Group]:
    """Return the perfect matching of least loss (Edmonds' blossom algorithm)."""
    import networkx

    graph = networkx.Graph()
    for pair in itertools.combinations(range(heads), 2):
        graph.add_edge(*pair, weight=loss(pair))
    return list(networkx.min_weight_matching(graph))


def _greedy(heads: int, size: int, loss: Loss) -> list[Group]:
    left, groups = set(range(heads)), []
    while left:
        group: Group = (min(left),)
        while len(group) < size:
            group = (*group, min(sorted(left - set(group)), key=lambda h: loss((*group, h))))  # noqa: B023
        groups.append(group)
        left -= set(group)
    return groups


def _swapped(groups: list[Group], loss: Loss) -> list[Group]:
    """Swap heads of two groups as long as the loss decreases."""
    better = True
    while better:
        better = False
        for a, b in itertools.combinations(range(len(groups)), 2):
            for i, j in itertools.product(groups[a], groups[b]):
                one = tuple(j if h == i else h for h in groups[a])
                two = tuple(i if h == j else h for h in groups[b])
                if loss(one) + loss(two) < loss(groups[a]) + loss(groups[b]) - 1e-12:
                    groups[a], groups[b], better = one, two, True
                    break
    return groups
