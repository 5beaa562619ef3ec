"""Results of several tensors are taken apart and made again, whatever type they are; attention functions likewise."""

import dataclasses
from typing import Any, NamedTuple

import pytest

from hf_attnpatch.errors import UpstreamChanged
from hf_attnpatch.upstream.calls import _arranged
from hf_attnpatch.upstream.parts import made_like, parts_of


class Named(NamedTuple):
    cosine: Any
    sine: Any


@dataclasses.dataclass
class Angles:
    cosine: Any
    sine: Any


@pytest.mark.parametrize("kind", [Named, Angles, lambda a, b: (a, b), lambda a, b: [a, b]])
def test_a_result_is_made_of_other_parts(kind):
    assert parts_of(kind(1, 2)) == (1, 2)
    assert made_like(kind(1, 2), [3, 4], "a test") == kind(3, 4)


def test_what_has_no_parts_is_refused_by_name():
    assert parts_of("ab") is None
    with pytest.raises(UpstreamChanged, match=r"a str in the place of a tuple of tensors, which a test needs"):
        made_like("ab", [1, 2], "a test")


@pytest.mark.parametrize(
    ("places", "others", "args", "kwargs"),
    [
        ((0, 1, 2, 3, 4), {}, list("mqkvx"), {}),
        ((1, 2, 3, 4, 5), {0: None}, [None, *"mqkvx"], {}),
        ((0, 2, 3, 4, "mask"), {1: 7}, ["m", 7, *"qkv"], {"mask": "x"}),
    ],
)
def test_states_go_where_an_attention_function_wants_them(places, others, args, kwargs):
    assert _arranged(places, others, "mqkvx") == (args, kwargs)
