"""Access to the Hub: one commit or none, errors with advice, and no token in any of them."""

from __future__ import annotations

import contextlib
import hashlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_session
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from ..errors import AttnPatchError
from ..showing import line
from . import confidential

# httpx' or httpx2's root of errors, whichever the installed huggingface_hub is built on
_HTTP_ERROR: type[BaseException] = HfHubHTTPError.__bases__[0]
_REMEDIES = {
    400: "what it was sent is not what it wants",
    401: "give a token that it accepts: `hf auth login`, HF_TOKEN, or token=",
    403: "the token may not do this; use one that may write to this repository",
    404: "there is no such repository, or the token may not see it",
    409: "somebody else changed it meanwhile; look at it and run the same again",
    412: "somebody else committed to it meanwhile; look at it, and replace it with overwrite if that is wanted",
    413: "a file is too large for it; choose a smaller max_shard_size",
    429: "too many requests; wait and run the same again",
}
PATIENCE = 120.0  # seconds without a byte from the Hub, after which a request has failed
_AGAIN = "run the same again; files that have arrived whole are not transferred again"


def is_reachable() -> bool:
    """Return whether the Hub answers, asked once; huggingface_hub would try for a minute."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10.0)
    except _HTTP_ERROR:
        return False
    return True


@dataclass(frozen=True)
class Head:
    """The state of a repository: its newest commit, whether it is private, and its files."""

    commit: str
    private: bool
    files: tuple[str, ...]


@dataclass(frozen=True)
class Hub:
    """The Hub that ``HF_ENDPOINT`` names.

    Attributes:
        given: token; None takes the one that huggingface_hub finds (``HF_TOKEN``, ``hf auth login``).
        version: of this package, for the Hub's statistics.
        nameless: whether requests carry no token, and see what is public only.
    """

    given: str | None = field(default=None, repr=False)
    version: str | None = None
    nameless: bool = False

    @property
    def api(self) -> HfApi:
        """The client."""
        return HfApi(token=self.sent, library_name="hf_attnpatch", library_version=self.version)

    @property
    def sent(self) -> str | bool | None:
        """The token argument of huggingface_hub: a token, None for the one that it finds, or False for none."""
        return False if self.nameless else self.given

    @property
    def token(self) -> str | None:
        """The user's token, which is hidden in every output."""
        return self.given or huggingface_hub.get_token()

    def anonymous(self) -> Hub:
        """Return the same Hub without a token."""
        return replace(self, nameless=True)

    def look(self, repo_id: str) -> Head | None:
        """Return the contents of a model repository, or None if the token can see none.

        Raises:
            AttnPatchError: the Hub cannot be asked.
        """
        with self.explained(repo_id, "looking whether it exists"):
            try:
                info = self.api.model_info(repo_id)
            except RepositoryNotFoundError:
                return None
        return Head(str(info.sha), bool(info.private), tuple(sorted(s.rfilename for s in info.siblings or ())))

    def create(self, repo_id: str, private: bool | None) -> Head:
        """Make an empty model repository.

        Raises:
            AttnPatchError: the Hub refuses.
        """
        with self.explained(repo_id, "creating it"):
            self.api.create_repo(repo_id, private=private)
        head = self.look(repo_id)
        if head is None:
            raise AttnPatchError(f"{repo_id}: was created, but the Hub does not show it; {_REMEDIES[401]}.")
        return head

    def commit(
        self, repo_id: str, folder: Path, head: Head, stale: Sequence[str], message: str
    ) -> tuple[str, tuple[str, ...]]:
        """Upload a folder as one commit on top of ``head``, which replaces the content completely or not at all.

        What the repository then holds is compared with the folder, file by file, by digest; so an answer that got lost
        on the way does not count as a failure, nor one that claims too much as a success.

        Args:
            repo_id: of a model.
            folder: all of its files are sent.
            head: what was there when it was looked at; the Hub refuses if somebody has committed since.
            stale: files to delete in the same commit.
            message: of the commit.

        Returns:
            The commit that the repository now shows, and the names of what was sent.

        Raises:
            AttnPatchError: it is not there; what arrived is not visible to anybody.
        """
        names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
        adds = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(folder / name)) for name in names]
        gone = [CommitOperationDelete(path_in_repo=name, is_folder=False) for name in stale]
        failure: AttnPatchError | None = None
        try:
            with self.explained(repo_id, "sending the files"):
                self.api.create_commit(repo_id, [*adds, *gone], commit_message=message, parent_commit=head.commit)
        except AttnPatchError as error:
            failure = error
        commit, wrong = self._differing(repo_id, adds, failure)
        if not wrong:
            return commit, tuple(names)
        if failure is not None:
            raise AttnPatchError(f"{failure} Nothing of it was published: {len(wrong)} files are missing there.") from (
                failure.__cause__
            )
        raise AttnPatchError(f"{repo_id}: the Hub took the commit, but {_few(wrong)} there differ from here; {_AGAIN}.")

    def _differing(
        self, repo_id: str, adds: Sequence[CommitOperationAdd], failure: AttnPatchError | None
    ) -> tuple[str, list[str]]:
        """Return the newest commit, and the files that are missing or differ there."""
        try:
            with self.explained(repo_id, "comparing what arrived"):
                head = str(self.api.model_info(repo_id).sha)
                tree = self.api.list_repo_tree(repo_id, recursive=True, revision=head)
                there = {f.path: f.lfs.sha256 if f.lfs else f.blob_id for f in tree if isinstance(f, RepoFile)}
        except AttnPatchError as error:
            if failure is None:
                raise
            raise AttnPatchError(f"{failure} Whether it arrived could not be asked: {error}") from error.__cause__
        return head, [add.path_in_repo for add in adds if there.get(add.path_in_repo) not in _digests(add)]

    @contextlib.contextmanager
    def explained(self, repo_id: str, doing: str) -> Iterator[None]:
        """Shorten errors of the Hub, including silence, to one line without the token.

        The original error stays chained, for a traceback, unless the token stands somewhere in it.

        Raises:
            AttnPatchError: in the place of errors of HTTP, of files, and of huggingface_hub.
        """
        try:
            with _patient():
                yield
        except AttnPatchError:
            raise
        except (_HTTP_ERROR, OSError, ValueError, RuntimeError) as error:
            clear = AttnPatchError(f"{repo_id}: {doing}: {self.hide(_problem(error))}.")
            told = "".join(traceback.format_exception(error))
            raise clear from (error if self.hide(told) == told else None)

    @contextlib.contextmanager
    def downloading(self, name: str) -> Iterator[None]:
        """Say clearly that the connection broke; else let through what is raised, unless a token stands in it.

        Raises:
            AttnPatchError: the connection broke, once huggingface_hub has given up.
            OSError: with the token hidden, where the Hub's answer repeats it.
        """
        try:
            yield
        except (_HTTP_ERROR, OSError) as error:
            told = "".join(traceback.format_exception(error))
            secret = self.hide(told) != told
            broken = any(isinstance(x, _HTTP_ERROR) and not isinstance(x, HfHubHTTPError) for x in _chain(error))
            if broken:
                clear: Exception = AttnPatchError(f"{name}: loading it: {self.hide(_problem(error))}.")
                raise clear from (None if secret else error)
            if secret:
                raise OSError(self.hide(str(error))) from None
            raise

    def hide(self, text: str) -> str:
        """Return a text without the token, or anything that looks like a token."""
        return confidential.hidden(text, self.token)


@contextlib.contextmanager
def _patient() -> Iterator[None]:
    """Limit the waiting time to :data:`PATIENCE`: huggingface_hub waits forever when it publishes."""
    session = get_session()
    before, session.timeout = session.timeout, PATIENCE
    try:
        yield
    finally:
        session.timeout = before


def _problem(error: BaseException) -> str:
    """Return what the Hub answered, or what broke, and what to do."""
    for link in _chain(error):
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            said = line(str(getattr(link, "server_message", None) or ""), 200)
            remedy = _REMEDIES.get(status, _AGAIN if status >= 500 else "see its answer")
            return f"the Hub answered {status}{f' ({said})' if said else ''}; {remedy}"
    for link in _chain(error):
        if isinstance(link, _HTTP_ERROR):
            said = line(str(link), 200)
            return f"the connection to the Hub broke ({type(link).__name__}: {said}); {_AGAIN}"
    return f"{type(error).__name__}: {line(str(error))}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _digests(add: CommitOperationAdd) -> tuple[str, str]:
    """Return the digests under which the Hub may know a file: as a large file, and as a git blob."""
    sha256 = add.upload_info.sha256.hex()
    blob = hashlib.sha1(f"blob {add.upload_info.size}\0".encode())
    with add.as_file() as file:
        while chunk := file.read(1 << 20):
            blob.update(chunk)
    return sha256, blob.hexdigest()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
