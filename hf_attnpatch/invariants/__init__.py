"""The invariants that every correct model keeps, one small function each.

A function gets a :class:`Subject` and returns a measurement, or a sentence why it does not apply. ``verify`` runs this
table on the user's model; the contract tests run it on every architecture with every patch.
"""

from collections.abc import Callable, Mapping

from .copies import copied, saved_and_loaded, saved_in_shards_and_loaded
from .decoding import decoded_after_padding, decoded_in_two_chunks, decoded_token_by_token
from .forward import after_a_longer_request, alone_or_in_a_batch, blind_to_the_future, padded, repeated
from .kernels import eager_agrees, flex_agrees, sdpa_agrees
from .subject import Answer, Measured, Subject
from .training import checkpointing_changes_nothing, gradients_arrive
from .ways import assisted, beams, learned_prefix, static_cache, with_media

INVARIANTS: Mapping[str, Callable[[Subject], Answer]] = {
    "two forwards are equal": repeated,
    "later tokens do not matter": blind_to_the_future,
    "cached decoding, token by token": decoded_token_by_token,
    "cached decoding, two chunks": decoded_in_two_chunks,
    "cached decoding after padding": decoded_after_padding,
    "padding does not matter": padded,
    "alone or in a batch": alone_or_in_a_batch,
    "first request or after a longer one": after_a_longer_request,
    "saved and loaded": saved_and_loaded,
    "saved in shards and loaded": saved_in_shards_and_loaded,
    "deepcopy": copied,
    "gradients reach the attention": gradients_arrive,
    "gradient checkpointing": checkpointing_changes_nothing,
    "eager attention agrees": eager_agrees,
    "sdpa agrees": sdpa_agrees,
    "flex attention agrees": flex_agrees,
}
# other ways of running a model; slow, so that the contract tests run them on some families only
WAYS: Mapping[str, Callable[[Subject], Answer]] = {
    "static cache, chunked prefill": static_cache,
    "assisted decoding": assisted,
    "beams": beams,
    "learned prefix (PEFT's prefix tuning)": learned_prefix,
    "images, sound, several axes of positions": with_media,
}
SAVING = ("saved and loaded", "saved in shards and loaded")

__all__ = ["INVARIANTS", "SAVING", "WAYS", "Answer", "Measured", "Subject"]
