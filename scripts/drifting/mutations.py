"""The changes that are rehearsed: a line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from .copies import Change
from .move import Move
from .rename import ROLES, Rename
from .shape import AddArgument, PassByKeyword, WrapReturn
from .source import InvalidMutation
from .written import Decorate, KeywordOnly, PassByPosition, Rewrite

# what a caller of a model says and reads; `output:` is a field of what comes back
SPOKEN = ("input_ids", "decoder_input_ids", "attention_mask", "position_ids", "cache", "use_cache")
READ = ("output:logits", "output:cache")


@dataclass(frozen=True)
class Mutation:
    """A change of transformers that leaves what it computes the same.

    Attributes:
        name: on the command line and in tables.
        changes: in order.
        says: how a caller's words change, beside what follows from `changes`.
    """

    name: str
    changes: tuple[Change, ...]
    says: Mapping[str, str] = field(default_factory=dict)

    @property
    def vocabulary(self) -> dict[str, str]:
        """What each of `SPOKEN` and `READ` is called after the change."""
        found = {word: word.removeprefix("output:") for word in (*SPOKEN, *READ)}
        for change in self.changes:
            if isinstance(change, Rename):
                whole = not (change.inside or change.callee or change.files)
                spoken = whole and {"parameter", "keyword"} <= set(change.roles)
                read = not change.files and {"field", "attribute"} <= set(change.roles)
                for word, now in found.items():
                    if now == change.old and (read if word in READ else spoken):
                        found[word] = change.new
        return {**found, **self.says}

    @property
    def words(self) -> tuple[str, ...]:
        """Of which a refusal must name one."""
        return tuple(dict.fromkeys(word for change in self.changes for word in change.words))


_INTERFACE = r"attention_forward$|^(sdpa|flex|eager|flash)\w*attention|^_?flash_attention_forward$"
_CALLED = r"^(attention_interface|attn_interface|attention_fn)$"
_RECEIVER = r"(^|[._])(cache|layer_past|cache_layer)$|(^|\.)layers\[|^super\(\)$"
_OUT = r"^(encoder_|decoder_|transformer_|model_)?outputs?$"
_ATTENTION = r"^(?!T5Layer)\w*Attention[.]forward$"
_MASKS = r"^create_\w*mask(s_for_generate)?$"
_MASK_FUNCTIONS = r"(sdpa|eager|flash_attention|flex_attention)_mask"
_FUNCTIONS = ("name", "parameter", "keyword")
_MODELS = "^models/"
_IN_SOURCES = "^modeling_utils.py$"  # which looks into sources for who asks the registry
_TRACED = """from functools import wraps


def traced(function):
    @wraps(function)
    def run(*args, **kwargs):
        return function(*args, **kwargs)

    return run
"""
_BARE = _TRACED.replace("from functools import wraps\n\n\n", "").replace("    @wraps(function)\n", "")
_REGISTRY = """def attention_function(implementation, default):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, default)
"""
# three projections in one module, and one in three: the same weights, one below the other
_FUSED = (
    Rewrite(
        r"(?s)self\.q_proj = nn\.Linear\((?:(?!nn\.Linear).)*?bias=([\w.]+)\s*\)\s*"
        r"self\.k_proj = .*?(?=\n *self\.o_proj)",
        r"self.qkv_proj = nn.Linear(config.hidden_size, "
        r"(config.num_attention_heads + 2 * config.num_key_value_heads) * self.head_dim, bias=\1)",
        ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        files="^models/(llama|mistral)/modeling",
    ),
    Rewrite(
        r"query_states = self\.q_proj\(hidden_states\).*\n( *)key_states = .*\n.*",
        r"states = self.qkv_proj(hidden_states).view(hidden_shape).transpose(1, 2)\n"
        r"\1shared = states.shape[1] // (self.num_key_value_groups + 2)\n"
        r"\1query_states, key_states, value_states = states.split("
        r"[shared * self.num_key_value_groups, shared, shared], 1)",
        ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        files="^models/(llama|mistral)/modeling",
    ),
)
_SPLIT = (
    Rewrite(
        r"self\.qkv_proj = nn\.Linear\(.*",
        r"heads, shared = config.num_attention_heads, config.num_key_value_heads\n"
        r"        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)\n"
        r"        self.k_proj = nn.Linear(config.hidden_size, shared * self.head_dim, bias=False)\n"
        r"        self.v_proj = nn.Linear(config.hidden_size, shared * self.head_dim, bias=False)",
        ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        files="^models/phi3/modeling",
    ),
    Rewrite(
        r"self\.qkv_proj\(hidden_states\)",
        r"torch.cat([self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)], -1)",
        ("q_proj", "k_proj", "v_proj", "qkv_proj"),
        files="^models/phi3/modeling",
    ),
)


def _named(name: str, *changes: Change, **says: str) -> Mutation:
    return Mutation(name, changes, {word.replace("output_", "output:"): new for word, new in says.items()})


MUTATIONS = (
    # an argument through the whole package
    _named("cache", Rename("cache", "kv_store")),
    _named(
        "cache, old spellings gone",
        Rename("cache", "kv_store"),
        Rename("past_key_values", "stored_keys"),
        Rename("cache_params", "stored_states"),
    ),
    _named("position_embeddings", Rename("position_embeddings", "rotary_pair")),
    _named("attention_mask", Rename("attention_mask", "visibility")),
    _named("position_ids", Rename("position_ids", "token_positions")),
    _named("hidden_states", Rename("hidden_states", "stream")),
    _named("use_cache", Rename("use_cache", "keep_states")),
    # attributes, buffers, tables
    _named("scaling", Rename("scaling", "score_scale")),
    _named("self.scaling", Rename("scaling", "score_scale", ("attribute",))),
    _named("layer_idx", Rename("layer_idx", "layer_number")),
    _named("inv_freq", Rename("inv_freq", "frequencies")),
    _named("rotary_emb", Rename("rotary_emb", "turner")),
    _named("num_key_value_groups", Rename("num_key_value_groups", "shared_by")),
    _named(
        "ALL_ATTENTION_FUNCTIONS",
        Rename("ALL_ATTENTION_FUNCTIONS", "ATTENTION_KERNELS"),
        Rewrite(r'"ALL_ATTENTION_FUNCTIONS\.', '"ATTENTION_KERNELS.', (), files=_IN_SOURCES),
    ),
    # methods of the cache
    _named("get_seq_length", Rename("get_seq_length", "seen_tokens")),
    _named(
        "update",
        Rename("update", "append", ("method",), inside="Cache|Layer"),
        *[Rename("update", "append", ("attribute",), receiver=_RECEIVER)],
    ),
    # projections, and with them the names of a checkpoint's tensors
    _named("q_proj", *(Rename(f"{x}_proj", f"to_{x}") for x in "qkv")),
    # keywords of the attention interface
    _named(
        "interface scaling",
        Rename("scaling", "softmax_scale", _FUNCTIONS, inside=_INTERFACE),
        Rename("scaling", "softmax_scale", ("keyword",), callee=_CALLED),
    ),
    _named(
        "interface dropout",
        Rename("dropout", "drop_rate", _FUNCTIONS, inside=_INTERFACE),
        Rename("dropout", "drop_rate", ("keyword",), callee=_CALLED),
    ),
    # fields of an output
    _named("output logits", Rename("logits", "token_scores")),
    _named(
        "output cache",
        Rename("cache", "kv_store", ("field",), inside="Output"),
        Rename("cache", "kv_store", ("keyword",), callee=r"Output\w*$"),
        Rename("cache", "kv_store", ("attribute", "string"), receiver=_OUT),
        output_cache="kv_store",
    ),
    # modules
    _named("module cache_utils", Move("cache_utils", "caching.store")),
    _named("module masking_utils", Move("masking_utils", "masks")),
    _named("module sdpa_attention", Move("integrations.sdpa_attention", "kernels_sdpa.forward")),
    _named("module modeling_rope_utils", Move("modeling_rope_utils", "rope.parameters")),
    # signatures and results
    _named("argument before attention's", AddArgument(_ATTENTION, "context", files="^models/")),
    _named("argument before a mask's", AddArgument(_MASKS, "purpose", calls=_MASKS)),
    _named(
        "argument before a mask function's",
        AddArgument(rf"^{_MASK_FUNCTIONS}$", "purpose", calls=rf"^({_MASK_FUNCTIONS}|mask_interface)$"),
    ),
    _named(
        "argument before the interface's",
        AddArgument(r"^[a-z]\w+_attention_forward$", "context", rf"{_CALLED}|^(sdpa|flash)_attention_forward$"),
    ),
    _named("mask by keyword", PassByKeyword(_CALLED, 4, ("attention_mask",))),
    _named(
        "hidden states by keyword",
        PassByKeyword(r"^(decoder_layer|layer|block|layer_module)$", 0, ("hidden_states",), "^models/"),
    ),
    _named(
        "rotary returns a dataclass",
        WrapReturn(
            r"RotaryEmbedding[.]forward$", "Angles", ("cosine", "sine"), unpack=r"^position_embeddings$|rotary_emb\("
        ),
    ),
    # the same forward, written or called otherwise
    _named("attention by keyword only", KeywordOnly(_ATTENTION, _MODELS)),
    _named("attention by position", PassByPosition(_ATTENTION, "hidden_states", _MODELS)),
    _named("attention decorated", Decorate(_ATTENTION, "traced", _TRACED, _MODELS)),
    _named("attention behind another signature", Decorate(_ATTENTION, "traced", _BARE, _MODELS)),
    _named(
        "registry behind a function",
        Rewrite(
            r"ALL_ATTENTION_FUNCTIONS\.get_interface\(",
            "attention_function(",
            ("attention_function", "ALL_ATTENTION_FUNCTIONS"),
            _REGISTRY,
            "attention_function",
            _MODELS,
        ),
        Rewrite(r'"ALL_ATTENTION_FUNCTIONS\.get_interface\("', '"attention_function("', (), files=_IN_SOURCES),
    ),
    _named("projections fused", *_FUSED),
    _named("projections split", *_SPLIT),
    _named(
        "attention returns a named tuple", WrapReturn(_ATTENTION, "Attended", ("output", "weights"), files="^models/")
    ),
)


def by_name(name: str) -> Mutation:
    """Return a mutation of the table.

    Raises:
        InvalidMutation: there is none of this name.
    """
    found = next((m for m in MUTATIONS if m.name == name), None)
    if found is None:
        raise InvalidMutation(f"{name}: no such mutation; there are {', '.join(m.name for m in MUTATIONS)}")
    return found


def together(*names: str) -> Mutation:
    """Several mutations of the table in one copy."""
    found = [by_name(name) for name in names]
    says = {word: now for m in found for word, now in m.says.items()}
    return Mutation(" and ".join(names), tuple(change for m in found for change in m.changes), says)


def renaming(text: str) -> Mutation:
    """Read `old=new`, several of them with commas, and `@role+role` behind: what `--rename` takes."""
    pairs, _, roles = text.partition("@")
    chosen = tuple(roles.split("+")) if roles else ROLES
    names = [pair.partition("=")[::2] for pair in pairs.split(",")]
    return Mutation(f"rename {text}", tuple(Rename(old.strip(), new.strip(), chosen) for old, new in names))


def moving(text: str) -> Mutation:
    """Read `module=module`, dotted and below the package: what `--move` takes."""
    old, _, new = text.partition("=")
    if not new:
        raise InvalidMutation(f"--move {text}: it must be MODULE=MODULE, such as cache_utils=caching.store")
    return Mutation(f"move {text}", (Move(old.removeprefix("transformers."), new.removeprefix("transformers.")),))
