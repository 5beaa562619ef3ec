"""What the installed transformers calls a cache: the tests speak to stock models in its words, old or new."""

import inspect

from transformers import LlamaForCausalLM

CACHE = next(
    name for name in ("cache", "past_key_values") if name in inspect.signature(LlamaForCausalLM.forward).parameters
)
