"""Groups of heads against all partitions there are."""

import functools
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attnpatch.functional import partition
from hf_attnpatch.functional.partition import adjacent, similar


@functools.cache
def all_partitions(heads, size):
    """Every way to put heads into groups of one size: slow and simple."""
    if not heads:
        return {frozenset()}
    return {
        rest | {group}
        for group in itertools.combinations(heads, size)
        for rest in all_partitions(tuple(h for h in heads if h not in group), size)
    }


def random_loss(seed, lowered=()):
    """A loss without any structure; some groups may cost nothing."""
    known, draw = {tuple(g): 0.0 for g in lowered}, random.Random(seed)

    def loss(group):
        assert list(group) == sorted(group), "members ascend"
        return known.setdefault(group, draw.random())

    return loss


def total(groups, loss):
    return sum(map(loss, groups))


def assert_partition(found, heads, groups):
    assert sorted(itertools.chain(*found)) == list(range(heads))
    assert {len(g) for g in found} == {heads // groups}
    assert found == sorted(tuple(sorted(g)) for g in found)


@settings(max_examples=60)
@given(shape=st.sampled_from([(4, 2), (6, 2), (6, 3), (8, 2), (8, 4)]), seed=st.integers(0, 10_000))
def test_up_to_eight_heads_it_is_the_best_there_is(shape, seed):
    heads, groups = shape
    loss = random_loss(seed)
    found = similar(heads, groups, loss)
    assert_partition(found, heads, groups)
    best = min(total(parts, loss) for parts in all_partitions(tuple(range(heads)), heads // groups))
    assert total(found, loss) == pytest.approx(best)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_pairs_of_ten_heads_are_the_best_there_are(seed):
    loss = random_loss(seed)
    found = similar(10, 5, loss)
    assert_partition(found, 10, 5)
    best = min(total(parts, loss) for parts in all_partitions(tuple(range(10)), 2))
    assert total(found, loss) == pytest.approx(best)


@settings(max_examples=60)
@given(
    shape=st.sampled_from([(9, 3), (12, 3), (12, 4), (16, 4), (16, 8), (32, 8)]),
    seed=st.integers(0, 10_000),
    spared=st.booleans(),
)
def test_beyond_it_is_never_worse_than_neighbours(shape, seed, spared):
    heads, groups = shape
    neighbours = adjacent(heads, groups)
    loss = random_loss(seed, neighbours if spared else ())
    found = similar(heads, groups, loss)
    assert_partition(found, heads, groups)
    assert total(found, loss) <= total(neighbours, loss) + 1e-9


@pytest.mark.parametrize("shape", [(9, 3), (12, 3), (12, 4)])
@pytest.mark.parametrize("seed", range(10))
def test_beyond_it_no_two_heads_would_gain_by_changing_places(shape, seed):
    heads, groups = shape
    loss = random_loss(seed)
    found = similar(heads, groups, loss)

    def pairs(group):
        return sum(loss(pair) for pair in itertools.combinations(sorted(group), 2))

    if found != adjacent(heads, groups):  # which it is where that is better as groups
        for one, two in itertools.combinations(found, 2):
            for i, j in itertools.product(one, two):
                swapped = ({*one} - {i} | {j}, {*two} - {j} | {i})
                assert total(swapped, pairs) >= total((one, two), pairs) - 1e-9


@pytest.mark.parametrize("shape", [(9, 3), (12, 3)])
@pytest.mark.parametrize("seed", range(20))
def test_beyond_it_the_better_of_two_starts_counts(shape, seed):
    heads, groups = shape
    loss = random_loss(seed)

    def pairs(group):
        return sum(loss(pair) for pair in itertools.combinations(sorted(group), 2))

    starts = (partition._greedy(heads, heads // groups, pairs), adjacent(heads, groups))
    ends = [partition._swapped(start, pairs) for start in starts] + [adjacent(heads, groups)]
    ends = [[tuple(sorted(group)) for group in end] for end in ends]
    assert total(similar(heads, groups, loss), loss) == pytest.approx(min(total(end, loss) for end in ends))


def test_the_first_start_takes_the_nearest_head_each_time():
    def loss(group):  # the last head that came is nearest to its half
        return abs(group[-1] - group[0] - 4) + 10 * (len(group) > 2) * abs(group[-1] - group[1] - 4)

    assert partition._greedy(12, 3, loss) == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]


@settings(max_examples=30)
@given(shape=st.sampled_from([(8, 2), (12, 3), (12, 6), (16, 4), (32, 8)]), seed=st.integers(0, 10_000))
def test_shuffled_families_are_found(shape, seed):
    """Heads of the same family cost nothing together: what retained energy looks like where heads were replicated."""
    heads, groups = shape
    family = [h % groups for h in range(heads)]
    random.Random(seed).shuffle(family)

    def loss(group):
        return float(sum(family[a] != family[b] for a, b in itertools.combinations(group, 2)))

    assert total(similar(heads, groups, loss), loss) == 0


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (12, 12), (12, 1)])
def test_where_there_is_no_choice_nothing_is_asked(heads, groups):
    def loss(group):
        raise AssertionError("asked")

    assert similar(heads, groups, loss) == adjacent(heads, groups)


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (12, 6), (12, 3), (16, 4)])
def test_every_group_is_asked_for_once_and_the_answer_repeats(heads, groups):
    asked = []

    def loss(group):
        asked.append(group)
        return math.sin(sum(h * h for h in group))

    found = similar(heads, groups, loss)
    assert len(asked) == len(set(asked))
    assert similar(heads, groups, lambda g: math.sin(sum(h * h for h in g))) == found


@pytest.mark.parametrize(("heads", "groups"), [(8, 4), (8, 2), (12, 6), (12, 3)])
def test_heads_that_are_all_alike_stay_where_they_are(heads, groups):
    assert similar(heads, groups, lambda group: 0.5) == adjacent(heads, groups)


def test_neighbours():
    assert adjacent(6, 3) == [(0, 1), (2, 3), (4, 5)]
    assert adjacent(6, 2) == [(0, 1, 2), (3, 4, 5)]
