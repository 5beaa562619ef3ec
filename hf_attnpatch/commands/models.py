"""Models for the command line: loads what a name refers to, and saves the result."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EMBEDDED = "embedded"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from and how it is loaded.

    Attributes:
        name: a folder, a hub name, or ``embedded``.
        dtype: a torch dtype by name, or ``auto`` for the checkpoint's own.
        device: a torch device.
        trust_remote_code: whether code in the checkpoint may run.
        revision: branch, tag or commit of a repository of the Hub; None for its newest.
    """

    name: str
    dtype: str = "auto"
    device: str = "cpu"
    trust_remote_code: bool = False
    revision: str | None = None

    @property
    def location(self) -> str:
        """The folder or hub name.

        Raises:
            AttnPatchError: the embedded model is not there.
        """
        if self.name != EMBEDDED or Path(self.name).exists():
            return self.name
        from ..embedded import path
        from ..errors import AttnPatchError

        folder = path()
        if not (folder / "config.json").is_file():
            raise AttnPatchError(f"{folder}: the embedded model is not in this installation; reinstall hf_attnpatch.")
        return str(folder)

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options for fetching files: local ones if the Hub cannot be reached, without five retries."""
        from ..publishing.hub import is_reachable

        here = Path(self.location).exists() or is_reachable()
        offline = {} if here else {"local_files_only": True}
        return {"trust_remote_code": self.trust_remote_code, **self.where, **offline}

    @property
    def where(self) -> dict[str, str]:
        """The revision of a repository.

        Raises:
            AttnPatchError: a folder has no revisions.
        """
        from ..errors import AttnPatchError

        if self.revision is None:
            return {}
        if Path(self.location).exists():
            raise AttnPatchError(f"--revision {self.revision}: {self.name} is a folder; only the Hub has revisions.")
        return {"revision": self.revision}

    def config(self) -> PretrainedConfig:
        """Return the config alone."""
        from ..checkpoint import config_of

        with self._explained():
            return config_of(self.location, **self.options)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        from ..errors import AttnPatchError

        if not self.options.get("local_files_only"):
            with _explained(self.name):
                yield
            return
        try:
            yield
        except OSError as error:
            raise AttnPatchError(
                f"{self.name}: the Hub cannot be reached, and no copy of it is in the cache of this machine; look at "
                "the connection and at HF_ENDPOINT, or name a folder."
            ) from error

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights: parameters on the meta device, rotary angles and other buffers real."""
        from accelerate import init_empty_weights

        from ..checkpoint import auto_class

        config = self.config()
        with _explained(self.name), init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=self.trust_remote_code)
        return model.eval()

    def model(self) -> PreTrainedModel:
        """Return the model with its weights, of the class named in the config's ``architectures``."""
        return self.model_with_info()[0]

    def model_with_info(self) -> tuple[PreTrainedModel, Mapping[str, Any]]:
        """Return the same, and transformers' report on the names in its files."""
        from ..checkpoint import load

        self._check_dtype()
        self._check_device()
        with self._explained():
            model, info = load(self.location, output_loading_info=True, dtype=self.dtype, **self.options)
            return model.to(self.device).eval(), info

    def tokenizer(self) -> Any | None:
        """Return the tokenizer, or None if the checkpoint has none."""
        from ..checkpoint import tokenizer_of

        with self._explained():
            return tokenizer_of(self.location, **self.options)

    def _check_dtype(self) -> None:
        import torch

        from ..errors import AttnPatchError

        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise AttnPatchError(f"--dtype {self.dtype}: choose auto, float32, bfloat16 or float16.")

    def _check_device(self) -> None:
        """Refuse a device that does not exist, before weights are loaded onto it."""
        import torch

        from ..errors import AttnPatchError

        here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        known = "cpu" if here is None else f"cpu or {here.type} (of which there are {torch.accelerator.device_count()})"
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise AttnPatchError(f"--device {self.device}: is none; wanted {known}.") from error
        there = device.type in ("cpu", "meta") or (here is not None and device.type == here.type)
        if not there or (here is not None and (device.index or 0) >= torch.accelerator.device_count() > 0):
            raise AttnPatchError(f"--device {self.device}: torch sees no such device here; wanted {known}.")


def size_of(model: PreTrainedModel) -> int:
    """Return the bytes of a model's tensors, each counted once: about the size of its checkpoint."""
    return sum(tensor.nbytes for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values())


def check_numbers(model: PreTrainedModel, name: str) -> None:
    """Refuse weights with infinity or NaN, also in rows that no probe reads.

    Raises:
        AttnPatchError: says which tensor.
    """
    from ..errors import AttnPatchError
    from ..functional.finite import all_finite

    wrong = next((path for path, weight in model.named_parameters() if not all_finite(weight)), None)
    if wrong is not None:
        raise AttnPatchError(f"{name}: {wrong} holds numbers that are not finite; get the checkpoint anew.")


def save(model: PreTrainedModel, tokenizer: Any | None, folder: Path, command: str | None, **options: Any) -> None:
    """Write a patched model with its tokenizer and the command line that made it.

    Args:
        model: patched.
        tokenizer: None where there is none.
        folder: where to, empty.
        command: as a reader would type it; None for a script.
        options: of ``save_pretrained``: ``max_shard_size``, or ``state_dict={}`` for all but the weights.
    """
    from .. import record

    model.save_pretrained(folder, **options)
    if command is not None:
        record.note_command(folder, command)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Say in one line that a checkpoint cannot be written.

    Raises:
        AttnPatchError: so.
    """
    from safetensors import SafetensorError

    from ..errors import AttnPatchError

    try:
        yield
    except (SafetensorError, OSError) as error:  # a full disk, as the library tells of it, and as the system does
        said = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise AttnPatchError(f"the checkpoint cannot be written: {' '.join(said.split())[:300]}") from error


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Shorten transformers' error about a checkpoint that it cannot load to one line; a bug keeps its traceback."""
    from ..errors import AttnPatchError

    try:
        yield
    except AttnPatchError:
        raise
    except Exception as error:
        if _is_about_the_checkpoint(error):
            said = " ".join(str(error).split())[:400]
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            trust = "; --trust-remote-code lets it run" if "trust_remote_code" in str(error) else ""
            raise AttnPatchError(f"{name}: cannot be loaded: {kind}{said}{trust}") from error
        raise


def _is_about_the_checkpoint(error: Exception) -> bool:
    """Tell a damaged file, an invalid config, a missing device or package from a bug."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    plain = type(error) is Exception  # what the tokenizers library raises for a file that it cannot read
    kinds = (OSError, ValueError, ImportError, KeyError, TypeError, RuntimeError, ArithmeticError, AssertionError)
    return plain or isinstance(error, (*kinds, SafetensorError, StrictDataclassError))
