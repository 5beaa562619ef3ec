"""Builds a folder beside its place and gives it its name in one step, or not at all.

It is built in a hidden folder beside it, ``.NAME.attnpatch-XXXXXXXX``, which holds a lock for as long as its process
lives. Killed at any point, a run leaves what stood there under its name, or the new folder under it, and at most that
hidden folder. The same command takes it up and goes on from it; any other run in the same place removes it. Where the
system cannot exchange two names in one step (anything but Linux), the old folder is moved aside first; if a kill falls
in between, the next run puts it back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from filelock import FileLock, Timeout

from ..errors import AttnPatchError
from .place import Picture, check_target, picture

_HIDDEN = re.compile(r"\.(?P<name>.+)\.attnpatch-[a-z0-9_]{8}", re.DOTALL)
_LOCK, _JOB, _ASIDE = "lock", "job", "aside"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux
_YOUNG = 60  # seconds, in which a run that has made its folder has locked it, too
_ENDED: list[int] = []  # signals that asked the running command to end
_CANNOT = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # the system or the file system knows no exchange


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, SIGHUP and SIGINT end the block like an error, so that nothing unfinished stays.

    A library may swallow the exception that a signal raises, or turn it into another. The signal is kept: the block
    ends with it all the same, before :func:`replacing` gives a folder its name. The handlers of before are put back.

    Raises:
        SystemExit: 128 + the number of the signal.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGINT") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    mine = [number for number, handler in before.items() if handler is not signal.SIG_IGN]  # nohup ignores one
    _ENDED.clear()
    for number in mine:
        signal.signal(number, _end)
    try:
        yield
    except Exception:
        _leave()
        raise
    else:
        _leave()
    finally:
        for number in mine:
            signal.signal(number, before[number])
        _ENDED.clear()


def _end(number: int, _: object) -> NoReturn:
    _ENDED.append(number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _leave() -> None:
    """End the command if a signal requested it.

    Raises:
        SystemExit: it did.
    """
    if _ENDED:
        raise SystemExit(128 + _ENDED[0]) from None


@contextlib.contextmanager
def replacing(
    target: Path, overwrite: bool, inputs: Mapping[str, str | Path | None] | None = None, job: str | None = None
) -> Iterator[Path]:
    """Give a folder beside ``target`` that takes its name once everything is written, or vanishes.

    It is empty, unless a run of the same job was killed here: then it holds what that one had written, of which
    nothing may be taken on trust. What is laid into :func:`aside_of` it goes with it, or stays for the next run.

    Args:
        target: where the folder is wanted; must not exist, or be empty.
        overwrite: whether a checkpoint that is there may be replaced.
        inputs: what is read to make it; see :func:`.place.check_target`.
        job: what is made; a run that was killed at the same one is gone on from. None begins anew.

    Raises:
        AttnPatchError: the folder cannot be made there; something is in the way, or has come there meanwhile, and the
            new folder is kept under another name then, which the error says.
    """
    target = Path(os.path.abspath(target))
    with _writable(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    clear_dead(target.parent, lambda place: _is_of(place, target, job))
    target = check_target(target, overwrite, inputs or {})
    before = picture(target)
    with _workplace(target, job) as place:
        new = place / "new"
        new.mkdir(exist_ok=True)
        yield new
        _leave()
        _sync(new)
        (place / _JOB).unlink(missing_ok=True)  # what is new may be what is old from here on
        _take_place(new, target, before, place / "old")
        _sync_entries(target.parent)


@contextlib.contextmanager
def _writable(target: Path) -> Iterator[None]:
    """Name the user's folder in an error about a folder that cannot be made; the system names a hidden one."""
    try:
        yield
    except OSError as error:
        raise AttnPatchError(
            f"{target}: cannot be written ({error.strerror}); wanted a name in a folder that can be."
        ) from error


def aside_of(new: Path) -> Path:
    """Return where what is needed on the way may lie, beside the folder that is being built."""
    return new.parent / _ASIDE


@contextlib.contextmanager
def _workplace(target: Path, job: str | None) -> Iterator[Path]:
    """Give a hidden folder that is locked while it is in use; it is gone afterwards."""
    with _writable(target):
        place, lock = _taken_up(target, job) or _made(target)
    try:
        with _writable(target):
            if job is not None:
                (place / _JOB).write_text(job, "utf-8")
        yield place
    finally:
        try:
            shutil.rmtree(place)
        finally:
            lock.release()


def _made(target: Path) -> tuple[Path, FileLock]:
    place = Path(tempfile.mkdtemp(prefix=f".{target.name}.attnpatch-", dir=target.parent))
    lock = FileLock(place / _LOCK)
    lock.acquire()
    return place, lock


def _taken_up(target: Path, job: str | None) -> tuple[Path, FileLock] | None:
    """Return the locked folder of a run of the same job that was killed, if there is one."""
    for place in target.parent.iterdir() if job is not None else ():
        if _is_of(place, target, job):
            lock = FileLock(place / _LOCK)
            with contextlib.suppress(Timeout, FileNotFoundError):
                lock.acquire(timeout=0)
                if _is_of(place, target, job):
                    return place, lock
                lock.release()
    return None


def _is_of(place: Path, target: Path, job: str | None) -> bool:
    """Whether a hidden folder is that of a job, and its content has not begun to take its place."""
    found = _HIDDEN.fullmatch(place.name)
    if job is None or found is None or found["name"] != target.name or not _is_own(place) or (place / "old").exists():
        return False
    try:
        return (place / _JOB).read_text("utf-8") == job
    except (OSError, UnicodeDecodeError):
        return False


def _take_place(new: Path, target: Path, before: Picture, old: Path) -> None:
    """Give ``new`` the name of ``target`` if that is unchanged; the old content moves to the hidden folder."""
    try:
        if not before:
            os.rename(new, target)  # fails over anything but nothing or an empty folder
            return
        if not _exchanged(new, target):
            _moved(new, target, before, old)
            return
        if picture(new) != before:  # it holds now what stood there
            _exchanged(new, target)
            raise FileExistsError(f"{target} was changed")
    except OSError as error:
        raise AttnPatchError(
            f"{target}: something came there, changed or holds it fast while the checkpoint was made ({error}); it is "
            f"left alone, and the new checkpoint is {_kept(new, target)}."
        ) from error


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False if that is impossible here.

    Raises:
        OSError: it failed for another reason.
    """
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if function is None:
        return False
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if function(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _moved(new: Path, target: Path, before: Picture, old: Path) -> None:
    """Swap in two steps, between which nothing has the name; see :func:`_recovered` for a kill there."""
    os.rename(target, old)
    try:
        if picture(old) != before:
            raise FileExistsError(f"{target} was changed")
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise


def _kept(new: Path, target: Path) -> Path:
    """Keep a complete checkpoint whose place was taken under its own name beside it."""
    beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    os.rename(new, beside)  # over the empty folder
    return beside


def clear_dead(folder: Path, wanted: Callable[[Path], bool] = lambda _: False) -> None:
    """Remove what runs that were killed have left in a folder, and put back what one of them had moved aside.

    A run that is alive holds its lock, on other machines that share the folder too, and is left alone; so is
    everything that another user owns.

    Args:
        folder: that is looked through.
        wanted: tells what is to be left for the run that goes on from it.
    """
    for place in folder.iterdir():
        found = _HIDDEN.fullmatch(place.name)
        if found is None or not _is_own(place) or wanted(place):
            continue
        with contextlib.suppress(Timeout, FileNotFoundError), FileLock(place / _LOCK, timeout=0):
            _recovered(place, folder / found["name"])


def _is_own(place: Path) -> bool:
    """Return whether a folder is this user's, contains only what :func:`_workplace` creates, and is not in use."""
    try:
        about = place.lstat()
        if place.is_symlink() or (hasattr(os, "getuid") and about.st_uid != os.getuid()):
            return False
        names = {entry.name for entry in place.iterdir()}
    except (FileNotFoundError, NotADirectoryError):  # gone meanwhile, or a file of that name
        return False
    return names <= {_LOCK, _JOB, _ASIDE, "new", "old"} and (_LOCK in names or time.time() - about.st_mtime > _YOUNG)


def _recovered(place: Path, target: Path) -> None:
    old, new = place / "old", place / "new"
    if old.exists() and new.exists():  # killed between the two steps of _moved
        if os.path.lexists(target):
            return  # somebody has put something there since: whoever did knows what is wanted
        os.rename(old, target)
    shutil.rmtree(place)


def _sync(folder: Path) -> None:
    """Flush a folder to disk, so that a power failure after the swap finds it complete."""
    for root, _, files in os.walk(folder):
        for name in files:
            with open(Path(root, name), "rb") as file:
                os.fsync(file.fileno())
        _sync_entries(Path(root))


def _sync_entries(folder: Path) -> None:
    if os.name != "posix":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
