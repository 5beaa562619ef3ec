"""Tables of README and pages: measured figures from committed results, and what each patch's page begins with."""

from __future__ import annotations

from dataclasses import dataclass

from facts import facts, peer_excess, result


@dataclass(frozen=True)
class About:
    """What a patch's page begins with.

    Attributes:
        title: the class.
        case: its row of the survey, or empty.
        training: whether the result has to be trained.
        papers: names of the index below.
    """

    title: str
    case: str
    training: str
    papers: tuple[str, ...]


PATCHES = {
    "grouped_query": About("GroupedQuery", "grouped_query_down", "helps", ("gqa", "procrustes")),
    "rope_scaling": About(
        "RopeScaling",
        "rope_scaling_yarn",
        "helps",
        ("pi", "yarn", "longrope", "resonance", "clipped", "pose"),
    ),
    "self_extend": About("SelfExtend", "self_extend", "no", ("selfextend",)),
    "re_rope": About("ReRope", "", "no", ("rerope",)),
    "dual_chunk": About("DualChunk", "", "no", ("dca",)),
    "jet_long": About("JetLong", "", "no", ("jetlong",)),
    "attention_sinks": About("AttentionSinks", "", "no", ("sinks",)),
    "segment_recurrence": About("SegmentRecurrence", "segment_recurrence", "helps", ("xl", "sinks")),
    "alibi": About("Alibi", "alibi", "needed", ("alibi",)),
    "relative_xl": About("RelativeXl", "relative_xl", "needed", ("xl",)),
    "rotary": About("Rotary", "rotary", "needed", ("rope",)),
    "sinusoidal": About("Sinusoidal", "sinusoidal", "needed", ("attention",)),
    "position_table": About("PositionTable", "position_table", "helps", ("longformer", "hierarchical")),
    "no_position": About("NoPosition", "no_position", "needed", ("nope", "drope")),
    "score_temperature": About("ScoreTemperature", "score_temperature", "no", ("swan",)),
    "windowed": About("Windowed", "windowed", "helps", ("klhybrid", "sinks")),
    "latent": About("Latent", "latent", "helps", ("mla", "transmla")),
    "flash": About("Flash", "flash", "no", ("flash2",)),
}
# name -> (authors and year, title, identifier on arXiv or an address)
PAPERS = {
    "attention": ("Vaswani et al., 2017", "Attention Is All You Need", "1706.03762"),
    "xl": ("Dai et al., 2019", "Transformer-XL: Attentive Language Models Beyond a Fixed-Length Context", "1901.02860"),
    "longformer": ("Beltagy et al., 2020", "Longformer: The Long-Document Transformer", "2004.05150"),
    "hierarchical": ("Su, 2020", "Hierarchical decomposition of position embeddings", "https://kexue.fm/archives/7947"),
    "rope": ("Su et al., 2021", "RoFormer: Enhanced Transformer with Rotary Position Embedding", "2104.09864"),
    "alibi": ("Press et al., 2021", "Train Short, Test Long: Attention with Linear Biases", "2108.12409"),
    "gqa": ("Ainslie et al., 2023", "GQA: Training Generalized Multi-Query Transformer Models", "2305.13245"),
    "nope": ("Kazemnejad et al., 2023", "The Impact of Positional Encoding on Length Generalization", "2305.19466"),
    "pi": (
        "Chen et al., 2023",
        "Extending Context Window of Large Language Models via Position Interpolation",
        "2306.15595",
    ),
    "rerope": ("Su, 2023", "Rectified Rotary Position Embeddings (ReRoPE)", "https://github.com/bojone/rerope"),
    "yarn": ("Peng et al., 2023", "YaRN: Efficient Context Window Extension of Large Language Models", "2309.00071"),
    "pose": (
        "Zhu et al., 2023",
        "PoSE: Efficient Context Window Extension via Positional Skip-wise Training",
        "2309.10400",
    ),
    "sinks": ("Xiao et al., 2023", "Efficient Streaming Language Models with Attention Sinks", "2309.17453"),
    "selfextend": ("Jin et al., 2024", "LLM Maybe LongLM: Self-Extend LLM Context Window Without Tuning", "2401.01325"),
    "dca": ("An et al., 2024", "Training-Free Long-Context Scaling of Large Language Models", "2402.17463"),
    "longrope": ("Ding et al., 2024", "LongRoPE: Extending LLM Context Window Beyond 2 Million Tokens", "2402.13753"),
    "resonance": ("Wang et al., 2024", "Resonance RoPE", "2403.00071"),
    "flash2": (
        "Dao, 2023",
        "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
        "2307.08691",
    ),
    "procrustes": ("Jin et al., 2024", "Align Attention Heads Before Merging Them", "2412.20677"),
    "klhybrid": (
        "Li et al., 2025",
        "Distilling to Hybrid Attention Models via KL-Guided Layer Selection",
        "2512.20569",
    ),
    "swan": (
        "Puvvada et al., 2025",
        "SWAN-GPT: An Efficient and Scalable Approach for Long-Context Language Modeling",
        "2504.08719",
    ),
    "mla": (
        "DeepSeek-AI, 2024",
        "DeepSeek-V2: A Strong, Economical, and Efficient Mixture-of-Experts Language Model",
        "2405.04434",
    ),
    "transmla": ("Meng et al., 2025", "TransMLA: Multi-Head Latent Attention Is All You Need", "2502.07864"),
    "drope": (
        "Gelberg et al., 2025",
        "Extending the Context of Pretrained LLMs by Dropping Their Positional Embeddings",
        "2512.12167",
    ),
    "clipped": ("CoPE, 2026", "CoPE: Clipped RoPE as A Scalable Free Lunch for Long Context LLMs", "2602.05258"),
    "jetlong": ("Jet-Long, 2026", "Jet-Long", "2607.07740"),
}


def parts() -> dict[str, str]:
    """Each table by the name of its markers."""
    cards = {f"card-{name}": _card(about) for name, about in PATCHES.items()}
    tables = {"rivals": _rivals(), "grouped-methods": _grouped_methods(), "extension": _extension()}
    return {**cards, **tables, "papers": _papers()}


def _card(about: About) -> str:
    """Where it applies, what loads it, whether it must be trained, whose idea it is."""
    known = facts()
    works, stock = (known.get(f"survey.{about.case}{end}", "not surveyed") for end in ("", ".stock"))
    papers = ", ".join(_link(name) for name in about.papers)
    return "\n".join(
        [
            "| architectures | of them stock checkpoints | training afterwards | papers |",
            "| --- | --- | --- | --- |",
            f"| {works} of {known['survey.types']} | {stock} | {about.training} | {papers} |"
            if about.case
            else f"| as [SelfExtend](self_extend.md) | none | {about.training} | {papers} |",
        ]
    )


def _link(name: str) -> str:
    who, _, where = PAPERS[name]
    return f"[{who}]({where if where.startswith('https:') else f'https://arxiv.org/abs/{where}'})"


def _papers() -> str:
    """Every paper with the patches that implement it."""
    lines = ["| paper | by | used in |", "| --- | --- | --- |"]
    for name, (_, title, _) in PAPERS.items():
        users = ", ".join(f"[`{a.title}`](patches/{page}.md)" for page, a in PATCHES.items() if name in a.papers)
        lines.append(f"| {title} | {_link(name)} | {users} |")
    return "\n".join(lines)


def _rivals() -> str:
    """A cache of a quarter: ours, averaging, and what drops tokens."""
    found = result("peers/peers.json")
    rows = found["cache"]["embedded, 8 -> 2"]["rows"]
    version = found["survive"]["kvpress"]["versions"]["kvpress"]
    asked = {
        "grouped query, refined": "**this package**, `refined`",
        "grouped query, principal": "**this package**, `principal` (no text)",
        "grouped query, mean": "averaged heads (Ainslie et al.)",
        "kvpress SnapKV": f"kvpress {version}, SnapKV",
        "kvpress ExpectedAttention": f"kvpress {version}, ExpectedAttention",
    }
    lines = [
        "| cache of a quarter (embedded model) | loss above original, nats | its cache after 127 new tokens "
        "| in the checkpoint |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, label in asked.items():
        share = rows[name]["bytes after"] / rows["whole cache"]["bytes after"]
        kept = "no: a hook around `generate`" if name.startswith("kvpress") else "yes"
        lines.append(f"| {label} | {peer_excess('8-2', name):.3f} | {share:.0%} | {kept} |")
    return "\n".join(lines)


def _grouped_methods() -> str:
    """Nats above the original, by method and heads."""
    known = facts()
    needs = {
        **dict.fromkeys(("first", "mean", "mean_rescaled", "procrustes"), "nothing"),
        **{"principal": "nothing (default)", "calibrated": "text", "refined": "text (default with it)"},
    }
    lines = [
        "| method | needs | 8 to 4 | 8 to 2 | 8 to 1 | SmolLM2, 3 to 1 |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for method, need in needs.items():
        cells = [known[f"grouped.embedded.{heads}.{method}"] for heads in ("8-4", "8-2", "8-1")]
        lines.append(f"| `{method}` | {need} | {' | '.join(cells)} | {known[f'grouped.smollm2.3-1.{method}']} |")
    return "\n".join(lines)


def _extension() -> str:
    """Without training: loss and passkeys at four times the context, loss at twice SmolLM2's, and speed."""
    known = facts()
    names = {
        "original": ("unpatched", None),
        "yarn": ("`yarn`, as in transformers", None),
        "dynamic_yarn": ("`dynamic_yarn` (per request)", None),
        "self_extend": ("`SelfExtend`", "self_extend"),
        "re_rope": ("`ReRope`", "re_rope"),
        "dual_chunk": ("`DualChunk`", "dual_chunk"),
        "jet_long": ("`JetLong`", "jet_long"),
        "attention_sinks": ("`AttentionSinks`", "attention_sinks"),
    }
    lines = [
        "| method | embedded at 512 | at 2,048 | passkeys at 2,048 | SmolLM2 at 16,384 | prompt | decoded token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell, (label, timed) in names.items():
        values = [known.get(f"{name.format(cell)}", "-") for name in _COLUMNS]
        times = [known[f"speed.{part}.{timed}"] if timed else "1" for part in ("prefill", "step")]
        lines.append(f"| {label} | {' | '.join([*values, *times])} |")
    return "\n".join(lines)


_COLUMNS = (
    "extend.embedded.{}.512",
    "extend.embedded.{}.2048",
    "passkey.{}.2048",
    "extend.smollm2.{}.16384",
)
