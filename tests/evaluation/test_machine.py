"""Tables of rates: what an operation takes by them, which files read as one, what is measured and kept."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attnpatch as ap
from hf_attnpatch.evaluation import hardware
from hf_attnpatch.evaluation.benchmarks import measured
from hf_attnpatch.evaluation.heap import Heap
from hf_attnpatch.evaluation.listener import Operation, Pass
from hf_attnpatch.evaluation.machine import Machine, Point, needs
from hf_attnpatch.evaluation.operations import Phantom
from hf_attnpatch.evaluation.roofline import cost, unmeasured

CPU = torch.device("cpu")
FILE = {
    "name": "box",
    "operation_seconds": 1e-6,
    "rates": {"float32": {"matmul": "1e9", "attention": 1e9, "bandwidth": 1e6}},
}


def operation(**fields):
    size = (("rows", 4), ("inner", 8), ("columns", 16), ("batch", 1))
    given = {"name": "mm", "kind": "matmul", "part": "weights", "dtype": "float32", "flops": 2 * 4 * 8 * 16}
    given |= {"reads": ((128, 0), (512, 10_000)), "written": 256, "allocated": (), "freed": (), "size": size}
    return Operation(**{**given, **fields})


def box(**fields):
    return hardware.from_mapping({**FILE, **fields}, "box")


# -- what an operation takes ------------------------------------------------------------------------------------------


def test_a_product_takes_its_arithmetic_or_its_memory():
    assert box().seconds(operation()) == pytest.approx((128 + 512 + 256) / 1e6)
    assert box().seconds(operation(flops=10**7)) == pytest.approx(10**7 / 1e9)


def test_a_loop_takes_its_memory_and_a_view_nothing():
    assert box().seconds(operation(kind="silu", reads=((1000, 0),), written=500)) == pytest.approx(1500 / 1e6)
    assert box().seconds(operation(kind="view", reads=(), written=0)) == 0


def test_a_measured_rate_is_used_at_its_size():
    ((kind, dtype, size),) = needs(operation())
    machine = box().extended([Point(kind, dtype, size, 2e9), Point(kind, dtype, (("rows", 512),), 1e3)])
    assert machine.seconds(operation()) == pytest.approx(2 * 4 * 8 * 16 / 2e9)  # memory is in the rate
    assert not machine.lacking([operation()])
    assert machine.lacking([operation(size=(("rows", 8), ("inner", 8), ("columns", 16), ("batch", 1)))])


def test_reading_what_was_touched_long_ago_takes_longer():
    points = [Point("copy", "float32", (("set", 2**16),), 1e9), Point("copy", "float32", (("set", 2**28),), 1e8)]
    machine = box().extended(points)
    near, far = (operation(kind="copy", reads=((2**16, age),), written=0) for age in (0, 2**30))
    assert machine.seconds(far) == pytest.approx(10 * machine.seconds(near))


def test_a_byte_of_a_dtype_without_a_rate_takes_what_a_byte_takes():
    """Such as a few biases in float64, on hardware whose table names what models compute in."""
    assert box().seconds(operation(kind="copy", dtype="float64", reads=((1000, 0),), written=500)) == pytest.approx(
        1.5e-3
    )


def test_a_missing_rate_is_an_error():
    with pytest.raises(
        ap.EvaluationError, match=r"hardware box: no rate for matmul in bfloat16; the table has attention"
    ):
        box().seconds(operation(dtype="bfloat16"))


def test_a_pass_adds_up():
    copies = operation(kind="copy", part="cache", reads=((1000, 0),), written=1000)
    phase = cost(box(call_seconds=1e-3), Pass((operation(flops=10**7), copies), 0, 0))
    overhead = 1e-3 + 2e-6
    assert phase.parts == pytest.approx({"weights": 1e-2, "cache": 2e-3, "attention": 0, "rest": overhead})
    assert phase.seconds == pytest.approx(1e-2 + 2e-3 + overhead)
    assert (phase.largest, phase.operations, phase.traffic_bytes) == ("weights", 2, 896 + 2000)


def test_decoding_attention_is_the_cache_as_far_as_memory_explains_it():
    size = (("queries", 1), ("keys", 100), ("heads", 1), ("head_dim", 8), ("group", 1), ("causal", 0))
    fields = {"name": "sdpa", "kind": "attention", "part": "attention", "reads": ((10_000, 0),), "written": 0}
    reading = cost(box(), Pass((operation(**fields, size=size, flops=1000),), 0, 0)).parts
    assert (reading["cache"], reading["attention"]) == (pytest.approx(1e-2), 0)
    counting = cost(box(), Pass((operation(**fields, size=size, flops=10**8),), 0, 0)).parts
    assert (counting["cache"], counting["attention"]) == (pytest.approx(1e-2), pytest.approx(0.1 - 1e-2))


def test_the_heap_keeps_what_fits():
    heap = Heap(100)
    take = lambda *sizes, freed=(): heap.fresh(operation(allocated=sizes, freed=freed))  # noqa: E731
    assert take(80, 80) == 0  # 200 are kept at first
    assert take(80) == 40  # grows by what is lacking
    assert take(150) == 150  # for itself, from the system
    assert take(150, freed=(150,)) == 150  # where it went back to
    assert take(80, freed=(80,)) == 0
    assert take(80, freed=(80, 80, 80)) == 80  # more than twice the threshold were free: all went back
    assert Heap(0).fresh(operation(allocated=(10**12,))) == 0


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_are_yaml_or_json_or_what_auto_wrote(tmp_path):
    rates = "{matmul: 1e9, attention: 1e9, bandwidth: 1e6}"
    found = [json.dumps(FILE), f"name: box\noperation_seconds: 1e-6\nrates: {{float32: {rates}}}"]
    found.append(json.dumps(box().to_dict()))
    for number, text in enumerate(found):
        (tmp_path / str(number)).write_text(text)
        machine = hardware.machine_for(str(tmp_path / str(number)), [], CPU)
        assert (machine.name, machine.points) == ("box", box().points)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"rate": 1}, r"no field 'rate'; fields are name, source, rates, threads"),
        ({"name": 3}, r"a name \(text\) and rates \(a mapping\) must be there"),
        ({"rates": {"float": {}}}, r"rates\.float lacks matmul, attention, bandwidth"),
        ({"rates": {"single": {}}}, r"rates for 'single', which is no dtype; write float32"),
        ({"rates": {"float32": {"matmul": 1, "attention": 1}}}, r"rates\.float32 lacks bandwidth; wanted: matmul"),
        (
            {"rates": {"float32": {"matmul": "fast", "attention": 1, "bandwidth": 1}}},
            r"matmul is 'fast'; wanted a number",
        ),
        ({"rates": {"float32": {"matmul": 0, "attention": 1, "bandwidth": 1}}}, "matmul is 0; wanted a number above 0"),
        ({"memory_bytes": -1}, "memory_bytes is -1; wanted a number of 0 or more"),
    ],
)
def test_a_file_that_is_no_machine_is_an_error(tmp_path, change, wanted):
    (tmp_path / "box.json").write_text(json.dumps({**FILE, **change}))
    with pytest.raises(ap.EvaluationError, match=wanted):
        hardware.machine_for(str(tmp_path / "box.json"), [], CPU)


def test_hardware_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(
        ap.EvaluationError, match="hardware 'h1000': neither a file nor in the table; choose auto, a100, h100"
    ):
        hardware.machine_for("h1000", [], CPU)
    for text, wanted in (("name: [", "write it as YAML or JSON"), ("- 1", "found a list; wanted a mapping")):
        (tmp_path / "box.yaml").write_text(text)
        with pytest.raises(ap.EvaluationError, match=wanted):
            hardware.machine_for(str(tmp_path / "box.yaml"), [], CPU)


@pytest.mark.parametrize("name", hardware.TABLE)
def test_rows_of_the_table_name_their_source(name):
    machine = hardware.machine_for(name, [], CPU)
    assert machine.memory_bytes > 0
    assert "data sheet" in machine.source


# -- measuring --------------------------------------------------------------------------------------------------------


@pytest.fixture
def passes():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    return list(Phantom(model).decode(1, 64))


def test_what_is_measured_is_kept_and_not_measured_again(passes, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "_bare", lambda device: box())
    asked = []

    def instead(kind, dtype, size, device):
        asked.append(kind)
        return Point(kind, dtype, size, 1e9)

    monkeypatch.setattr(hardware, "measured", instead)
    first = hardware.machine_for("auto", passes, CPU)
    assert {"matmul", "attention", "copy", "pointwise"} <= set(asked)
    assert not unmeasured(first, passes)
    (file,) = (tmp_path / "hf_attnpatch/machines").iterdir()
    assert hardware.machine_for(str(file), [], CPU) == first
    count = len(asked)
    assert hardware.machine_for("auto", passes, CPU) == first
    assert len(asked) == count
    hardware.machine_for("auto", passes, CPU, again=True)
    assert len(asked) == 2 * count


def test_every_kind_can_be_measured(passes, monkeypatch):
    monkeypatch.setattr("hf_attnpatch.evaluation.benchmarks.typical", lambda run, **_: (run(), 1.0)[1])
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4))
    trained = Phantom(model).training(1, 64)
    wanted = unmeasured(box(), [*passes, trained])
    rates = {kind: measured(kind, dtype, size, CPU).rate for kind, dtype, size in wanted}
    assert set(rates) >= {"matmul", "attention", "attention_backward", "copy", "pointwise", "reduce", "silu", "softmax"}
    ((_, _, size),) = needs(operation())
    assert measured("matmul", "float32", size, CPU).rate == pytest.approx(
        2 * 4 * 8 * 16 * (2**16 // 512)
    )  # in a second
    assert Machine.from_dict(json.loads(json.dumps(box().to_dict()))) == box()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"points": []}'])
def test_a_damaged_table_is_named(passes, tmp_path, monkeypatch, text):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(hardware, "measured_here", lambda *_: pytest.fail("it was measured"))
    file = hardware._file(CPU)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ap.EvaluationError, match=rf"{file.name}.*delete it, and measure again"):
        hardware.machine_for("auto", passes, CPU)


@pytest.mark.parametrize("points", [5, [5], [{}], [[["matmul", 1]]]])
def test_a_file_with_points_that_are_none_is_an_error(tmp_path, points):
    (tmp_path / "box.json").write_text(json.dumps({**box().to_dict(), "points": points}))
    with pytest.raises(ap.EvaluationError, match=r"box\.json: not a table of rates"):
        hardware.machine_for(str(tmp_path / "box.json"), [], CPU)


def test_a_table_that_cannot_be_kept_costs_no_measuring(passes, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(hardware, "measured_here", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(ap.EvaluationError, match="let XDG_CACHE_HOME name a folder"):
        hardware.machine_for("auto", passes, CPU)
