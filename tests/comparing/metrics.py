"""Metrics as a comparison writes them, made up: every part is there."""

SCORES = {"nats": 2.5, "low": 2.0, "high": 3.0, "tokens": 64, "losses": [["a", [80.0, 32]], ["b", [80.0, 32]]]}
WORSE = {"nats": 2.6, "low": 2.1, "high": 3.1, "tokens": 64, "losses": [["a", [83.0, 32]], ["b", [83.4, 32]]]}


def loss(score):
    fixed = {"targets": 32, "window": 64, "stride": 8}
    return {"lengths": [64, 256], "scores": [score, score], **fixed, "truncated": score, "sliding": score}


def answers(points):
    rows = [(n, d, 0) for n in (128, 256) for d in (0.0, 0.5, 1.0)]
    keys = ("length", "depth", "sample", "wanted", "answer", "score")
    found = [dict(zip(keys, (*row, ["42"], "42", points), strict=True)) for row in rows]
    fixed = {"task": "passkey", "lengths": [128, 256], "depths": [0.0, 0.5, 1.0], "samples": 1, "seed": 0}
    return {**fixed, "answers": found, "tokens": 10, "reused": 0}


def speed(factor):
    keys = ("prefill_tokens_per_second", "decode_tokens_per_second", "decode_limit", "cache_bytes")
    rows = [{"context": n, **dict(zip(keys, (n, factor * 1e3, 4e3, n * 100 / factor), strict=True))} for n in (64, 128)]
    return {"dtype": "float32", "threads": 1, "device": "cpu", "rows": rows}


MODEL = {"architecture": "Llama", "dtype": "float32", "context": 512, "parameters": 10, "cache_bytes_per_token": 8.0}
MODEL |= {"digest": "0" * 64, "record": None}
METRICS = {
    "original": {**MODEL, "name": "org/model"},
    "patched": {**MODEL, "name": "<script>alert(1)</script> & ![x](http://example.com/x.png)"},
    "parts": {
        "loss": {"original": loss(SCORES), "patched": loss(WORSE)},
        "fidelity": {
            "kl": SCORES,
            "top1": {"value": 0.5, "low": 0.4, "high": 0.6},
            "continuation": None,
            "continued": 0,
        },
        "layers": {"paths": ["a.0", "a.1"], "alone": [0.1, 0.2], "in_place": [0.1, 0.4], "tokens": 9},
        "retrieval": {"original": answers(100.0), "patched": answers(20.0)},
        "decoding": {"original": speed(1), "patched": speed(2)},
    },
    "text": "a text",
    "command": "attnpatch compare A B",
    "machine": {"threads": 1},
    "left_out": {},
    "seconds": {"loss": 60.0},
}
