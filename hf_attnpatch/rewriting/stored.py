"""safetensors files as they lie on the disk: what stands where in them, and new ones made of pieces of old ones.

Nothing is read into memory that is only moved: the system copies ranges of bytes from file to file, and shares them
where the file system can (Btrfs, XFS). Tensors are written a part at a time.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch
from torch import Tensor

from ..errors import AttnPatchError
from ..schema import from_json

_LONGEST = 100_000_000  # bytes of a header, as the format has it
_PART = 1 << 26  # bytes that are moved at once
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
# the file systems have no common way, or the system call is not there: bytes pass through memory
_CANNOT = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM)


@dataclass(frozen=True)
class Piece:
    """A tensor as it lies in a file.

    Attributes:
        file: that holds it.
        start: of its bytes in the file.
        nbytes: how many they are.
        kind: the format's name of its dtype.
        shape: of the tensor.
    """

    file: Path
    start: int
    nbytes: int
    kind: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype; None for one that this torch does not have."""
        return _DTYPES.get(self.kind)


Source: TypeAlias = Piece | Tensor  # what a tensor of a new file is made of


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        pieces: name of a tensor -> where it lies.
        metadata: texts beside them.
    """

    pieces: Mapping[str, Piece]
    metadata: Mapping[str, str]


def header_of(file: Path) -> Header:
    """Read the header of a file, and hold it to the file's size.

    Raises:
        AttnPatchError: it is no such file, or part of one.
        OSError: it cannot be read.
    """
    size = file.stat().st_size
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _LONGEST):
            raise _damaged(file, f"its header would have {length} bytes of {size}")
        text = opened.read(length)
    try:
        data = from_json(text.decode("utf-8"), str(file), unique=True)
    except UnicodeDecodeError as error:
        raise _damaged(file, "its header is no text") from error
    if not isinstance(data, dict):
        raise _damaged(file, "its header is no mapping")
    metadata = data.pop("__metadata__", None) or {}
    begin = 8 + length
    pieces = {name: _piece(file, begin, size, name, entry) for name, entry in data.items()}
    end = max((piece.start + piece.nbytes for piece in pieces.values()), default=begin)
    if end != size:
        raise _damaged(file, f"it has {size} bytes, and its tensors {end}")
    return Header(pieces, metadata)


def _piece(file: Path, begin: int, size: int, name: str, entry: Any) -> Piece:
    try:
        (start, end), shape, kind = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        whole = all(isinstance(n, int) and n >= 0 for n in (start, end, *shape))
        if whole and start <= end <= size - begin and isinstance(kind, str):
            found = Piece(file, begin + start, end - start, kind, shape)
            dtype = found.dtype
            if dtype is None or dtype.itemsize * math.prod(shape) == found.nbytes:
                return found
    except (TypeError, KeyError, ValueError):
        pass
    raise _damaged(file, f"{name[:100]!r} lies beyond its {size} bytes, or in others than its shape takes")


def _damaged(file: Path, what: str) -> AttnPatchError:
    return AttnPatchError(f"{file}: is damaged or incomplete ({what}); get it anew.")


def write(target: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> None:
    """Write a file of tensors, each a piece of another file or one in memory.

    Args:
        target: overwritten if it is there.
        tensors: by name; those of the largest numbers come first, so that all are aligned.
        metadata: texts beside them.

    Raises:
        OSError: it cannot be written.
    """
    order = ordered(tensors)
    head = _head(order, metadata)
    with open(target, "wb", buffering=0) as out:
        _put(out, memoryview(head))
        for _, source in order:
            if isinstance(source, Piece):
                _move(source.file, source.start, source.nbytes, out)
            else:
                for part in _parts(source):
                    _put(out, part)


def copy(file: Path, target: Path) -> None:
    """Copy a file; its bytes are shared where the file system can.

    Raises:
        OSError: it cannot be read or written.
    """
    with open(target, "wb", buffering=0) as out:
        _move(file, 0, file.stat().st_size, out)


def holds(target: Path, tensors: Mapping[str, Source], metadata: Mapping[str, str]) -> bool:
    """Whether a file is what :func:`write` would write, byte for byte; nothing is taken on trust."""
    order = ordered(tensors)
    head = _head(order, metadata)
    if not target.is_file() or target.stat().st_size != len(head) + sum(_nbytes(source) for _, source in order):
        return False
    with open(target, "rb", buffering=0) as found:
        if _got(found, len(head)) != head:
            return False
        return all(_same(found, part) for _, source in order for part in _bytes_of(source))


def same_file(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes."""
    if not other.is_file() or one.stat().st_size != other.stat().st_size:
        return False
    whole = Piece(one, 0, one.stat().st_size, "U8", ())
    with open(other, "rb", buffering=0) as found:
        return all(_same(found, part) for part in _bytes_of(whole))


def ordered(tensors: Mapping[str, Source]) -> list[tuple[str, Source]]:
    """Return tensors in the order of a file: the largest numbers first, then by name."""

    def rank(item: tuple[str, Source]) -> tuple[int, str]:
        dtype = item[1].dtype
        return (0 if dtype is None else -dtype.itemsize), item[0]

    return sorted(tensors.items(), key=rank)


def _head(order: Sequence[tuple[str, Source]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, source in order:
        kind = source.kind if isinstance(source, Piece) else _NAMES[source.dtype]
        end = start + _nbytes(source)
        entries[name] = {"dtype": kind, "shape": list(source.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _nbytes(source: Source) -> int:
    return source.nbytes


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(flat), _PART):
        yield memoryview(flat[start : start + _PART].numpy())  # type: ignore[arg-type]  # an array is a buffer


def _bytes_of(source: Source) -> Iterator[memoryview]:
    if isinstance(source, Tensor):
        yield from _parts(source)
        return
    with open(source.file, "rb", buffering=0) as opened:
        opened.seek(source.start)
        for start in range(0, source.nbytes, _PART):
            yield memoryview(_got(opened, min(_PART, source.nbytes - start)))


def _got(file: IO[bytes], count: int) -> bytes:
    """Read so many bytes, or as many as there are."""
    found = bytearray()
    while len(found) < count and (part := file.read(count - len(found))):
        found += part
    return bytes(found)


def _same(file: IO[bytes], part: memoryview) -> bool:
    return _got(file, len(part)) == part


def _put(out: IO[bytes], part: memoryview) -> None:
    while part:
        part = part[out.write(part) :]


def _move(file: Path, start: int, count: int, out: IO[bytes]) -> None:
    """Append a range of a file's bytes to another file that is open for writing."""
    with open(file, "rb", buffering=0) as opened:
        done = _moved(opened.fileno(), start, count, out.fileno())
        opened.seek(start + done)
        while done < count:
            part = opened.read(min(_PART, count - done))
            if not part:
                raise _damaged(file, f"it ends at byte {start + done}, before byte {start + count}")
            _put(out, memoryview(part))
            done += len(part)


def _moved(source: int, start: int, count: int, target: int) -> int:
    """Let the system copy bytes from file to file; return how many it did, fewer only where it cannot."""
    function = getattr(os, "copy_file_range", None)
    done = 0
    while function is not None and done < count:
        try:
            moved = function(source, target, min(count - done, 1 << 30), start + done)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            return done
        if not moved:
            return done
        done += moved
    return done


__all__ = ["Header", "Piece", "Source", "copy", "header_of", "holds", "ordered", "same_file", "write"]
