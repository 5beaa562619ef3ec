"""What each home says of its layers, field by field, and what it cannot say; configs alone, no model."""

import types

import pytest

from hf_attnpatch.errors import AttnPatchError, UnsupportedArchitecture
from hf_attnpatch.homes import checks
from hf_attnpatch.homes.rows import HOMES
from hf_attnpatch.layers import SLOPE, STEP, Layers, Temperature

ROW = {row.model_type: row for row in HOMES}
THETA, F, S = 500.0, "full_attention", "sliding_attention"
SCALED = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, STEP: 32}
EVERY = Layers((THETA,) * 4, (None,) * 4)


def config(rope=None, **more):
    return types.SimpleNamespace(
        **{
            "rope_parameters": {"rope_type": "default", "rope_theta": THETA} if rope is None else rope,
            "max_position_embeddings": 128,
            "hidden_size": 64,
            "num_attention_heads": 4,
            **more,
        }
    )


def layers(bases=(THETA,) * 4, windows=(None,) * 4, temperature=None):
    return Layers(tuple(bases), tuple(windows), temperature)


PLAIN = {"rope_type": "default", "rope_theta": THETA}
WARM = Temperature(0.3, 8)
SAID = {
    ("smollm3", layers([THETA, None, THETA, None], [8, None, 8, None])): {
        "rope_parameters": PLAIN,
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": [S, F, S, F],
    },
    ("smollm3", layers([None] * 4)): {
        "rope_parameters": PLAIN,
        "no_rope_layers": [0] * 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": [F] * 4,
    },
    ("smollm3", layers([300.0] * 4)): {
        "rope_parameters": {**PLAIN, "rope_theta": 300.0},
        "no_rope_layers": [1] * 4,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": [F] * 4,
    },
    ("cwm", layers(windows=[8, None, 8, 8])): {
        "rope_parameters": PLAIN,
        "sliding_window": 8,
        "layer_types": [S, F, S, S],
    },
    ("ministral", EVERY): {"rope_parameters": PLAIN, "sliding_window": 128, "layer_types": [F] * 4},
    ("qwen2", layers(windows=[8, None, 8, 8])): {
        "rope_parameters": PLAIN,
        "sliding_window": 8,
        "use_sliding_window": True,
        "layer_types": [S, F, S, S],
    },
    ("qwen3", EVERY): {
        "rope_parameters": PLAIN,
        "sliding_window": None,
        "use_sliding_window": False,
        "layer_types": [F] * 4,
    },
    ("mistral", layers(windows=[8] * 4)): {"rope_parameters": PLAIN, "sliding_window": 8},
    ("mistral", EVERY): {"rope_parameters": PLAIN, "sliding_window": None},
    ("ministral3", layers(temperature=WARM)): {
        "rope_parameters": {**PLAIN, SLOPE: 0.3, STEP: 8},
        "sliding_window": None,
    },
    ("ministral3", EVERY): {"rope_parameters": {**PLAIN, SLOPE: 0.0, STEP: 128}, "sliding_window": None},
    ("granite_swa", layers([THETA, 300.0, None, THETA], [8, None, 8, 8])): {
        "rope_parameters": PLAIN,
        "layer_rope_theta": [THETA, 300.0, 0, THETA],
        "sliding_window": 8,
        "layer_types": [S, F, S, S],
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
    },
}


@pytest.mark.parametrize(("home", "wanted"), SAID, ids=str)
def test_the_fields_of_a_home(home, wanted):
    given = config()
    assert ROW[home].fields(given, wanted) == SAID[home, wanted]
    assert ROW[home].since == ("5.15" if home == "granite_swa" else "5.0")
    assert given.rope_parameters == PLAIN  # the model's own is only read


def test_granite_keeps_what_a_config_says_itself():
    given = config(head_dim=64, residual_multiplier=0.5)
    found = ROW["granite_swa"].fields(given, EVERY)
    assert (found["attention_multiplier"], found["residual_multiplier"], found["logits_scaling"]) == (0.125, 0.5, 1.0)
    assert found["sliding_window"] == 128
    assert ROW["granite_swa"].fields(config(attention_multiplier=0.3), EVERY)["attention_multiplier"] == 0.3


def test_a_scaling_stays_and_an_old_slope_goes():
    found = ROW["cwm"].fields(config({**SCALED, SLOPE: 0.7}), layers([300.0] * 4))
    assert found["rope_parameters"] == {**SCALED, "rope_theta": 300.0}
    found = ROW["ministral3"].fields(config({**SCALED, SLOPE: 0.7}), EVERY)
    assert found["rope_parameters"] == {**SCALED, SLOPE: 0.0}  # with the length that the scaling has
    fits = ROW["ministral3"].fields(config(SCALED), layers(temperature=Temperature(0.3, 32)))
    assert fits["rope_parameters"] == {**SCALED, SLOPE: 0.3}
    bare = config()
    del bare.max_position_embeddings
    assert ROW["ministral3"].fields(bare, EVERY)["rope_parameters"][STEP] == 1  # positions are divided by it
    said = ROW["ministral3"].fields(config(SCALED), layers(temperature=WARM))
    assert said == "has one length for the temperature and for the rotary scaling, which is 32 here"


TWO, NONE = layers([THETA, 300.0, THETA, THETA]), layers([THETA, None, THETA, THETA])
WIDTHS, SOME = layers(windows=[8, 16, None, None]), layers(windows=[8, None, 8, 8])
CANNOT = {
    "has one rotary base for all layers": (TWO, ("smollm3", "cwm", "ministral", "qwen2", "mistral", "ministral3")),
    "rotates in every layer": (NONE, ("cwm", "ministral", "qwen3", "mistral", "ministral3")),
    "has one width for all windows": (WIDTHS, tuple(ROW)),
    "has a window in every layer or in none": (SOME, ("mistral", "ministral3")),
    "has no temperature that grows with the position": (
        layers(temperature=WARM),
        ("smollm3", "cwm", "ministral", "qwen2", "mistral", "granite_swa"),
    ),
}


@pytest.mark.parametrize("why", CANNOT)
def test_what_a_home_cannot_say(why):
    wanted, homes = CANNOT[why]
    assert {home: ROW[home].fields(config(), wanted) for home in homes} == dict.fromkeys(homes, why)


@pytest.mark.parametrize(
    ("home", "bases", "readers"),
    [
        ("smollm3", [THETA, THETA, THETA, None, THETA], ["vLLM", "llama.cpp"]),  # every fourth, whatever the file says
        ("smollm3", [THETA, THETA, None, THETA, THETA], ["vLLM"]),
        ("smollm3", [THETA] * 4, ["vLLM"]),
        ("smollm3", [THETA] * 3, ["vLLM", "llama.cpp"]),
        ("granite_swa", [THETA, None, THETA], ["vLLM", "llama.cpp"]),
        ("granite_swa", [THETA, 300.0, THETA], ["vLLM"]),
        ("granite_swa", [None, None], ["vLLM", "llama.cpp"]),
        ("mistral", [THETA] * 2, ["vLLM", "llama.cpp"]),
        ("ministral3", [THETA] * 2, ["vLLM", "llama.cpp"]),
        ("qwen2", [THETA] * 2, ["vLLM"]),
        ("cwm", [THETA] * 2, ["vLLM"]),
    ],
)
def test_who_else_reads_it(home, bases, readers):
    assert list(ROW[home].readers(layers(bases, [None] * len(bases)))) == readers


def test_homes_in_order():
    """Those that dispatch to every kernel come first, the one that runs eagerly last."""
    assert [row.model_type for row in HOMES if row.eager] == [HOMES[-1].model_type] == ["granite_swa"]
    assert [row.model_type for row in HOMES if row.fills] == ["granite_swa"]
    assert 2.718281828 ** ROW["granite_swa"].fills["sinks"] == 0.0  # a sink of this score takes nothing
    assert {row.since for row in HOMES} == {"5.0", "5.15"}


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [(None, None), ([2, 0], (0, 2)), ((1,), (1,)), (range(2, 0, -1), (1, 2)), ([0], (0,)), ([4095], (4095,))],
)
def test_numbers_of_layers(given, found):
    assert checks.checked_layers(given) == found


@pytest.mark.parametrize("given", [[], (), "12", 3, [-1], [1.0], [True], [0, None], [4096], {0, 1}, [[0]]])
def test_what_is_no_number_of_a_layer(given):
    with pytest.raises(AttnPatchError, match="give a list of layer numbers from 0, such as"):
        checks.checked_layers(given)


def test_a_layer_is_named_once():
    with pytest.raises(AttnPatchError, match=r"layers is \[3, 1, 3\], which names one twice"):
        checks.checked_layers((3, 1, 3))


@pytest.mark.parametrize("home", [None, "auto", *ROW])
def test_homes_there_are(home):
    checks.named(home)


@pytest.mark.parametrize("home", ["", "llama", "Auto", 1, False])
def test_homes_there_are_not(home):
    with pytest.raises(AttnPatchError, match="choose from: auto, qwen2, .*, granite_swa, or None"):
        checks.named(home)


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({}, True),
        ({"positions": "learned"}, False),
        ({"turned": ("a",)}, False),
        ({"inner": ("a",)}, False),
        ({"sites": [(False, False), (True, False)]}, False),
        ({"sites": [(False, True), (False, False)]}, False),
    ],
)
def test_rotary_modules_alone(fields, fine):
    given = {"architecture": "X", "positions": "rotary", "turned": (), "inner": (), "sites": [(False, False)], **fields}
    given["sites"] = [types.SimpleNamespace(cross=cross, tower=tower) for cross, tower in given["sites"]]
    anatomy = types.SimpleNamespace(**given)
    if fine:
        checks.rotary_alone(anatomy)
        return
    with pytest.raises(UnsupportedArchitecture, match="X: positions here are: "):
        checks.rotary_alone(anatomy)
