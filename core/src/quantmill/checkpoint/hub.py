"""A repository of a Hugging Face Hub as a source: ranges of files, all of one commit.

Everything goes through ``huggingface_hub``, so its settings hold: ``HF_ENDPOINT``, ``HF_TOKEN``,
``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_HUB_DOWNLOAD_TIMEOUT`` and proxies. A header costs one
request of 64 KiB, and a second one where it is longer; whole files are fetched only by
:meth:`HubSource.local_path`, into the Hub's cache.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from quantmill.checkpoint import codes
from quantmill.checkpoint.files import FolderSource
from quantmill.checkpoint.hubcalls import HubError, attempt, stream, take
from quantmill.findings import Finding

if TYPE_CHECKING:
    from quantmill.checkpoint.headers import CheckpointHeaders

__all__ = ["HubError", "HubSource"]

_FIRST: Final = 64 << 10
"""Bytes of a first request: the header of most files, and the JSON files, in one go."""
_SKIP: Final = 1 << 20
"""A server that ignores ranges may send so many bytes before the wanted ones, not more."""
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True)
class _Listing:
    """What a revision holds, asked for once."""

    commit: str
    sizes: dict[str, int | None]
    """Bytes by name; None until a first answer tells, where the Hub did not list them."""
    snapshot: FolderSource | None = None
    """The cached files, offline."""


class HubSource:
    """A repository of the Hub; only the ranges that are asked for are transferred.

    The revision is resolved to a commit at the first question, and all later ones are about that
    commit. Offline (``HF_HUB_OFFLINE``) the files are those of the local cache. Safe to use from
    several threads.
    """

    def __init__(self, repo_id: str, revision: str = "main") -> None:
        self.repo_id = repo_id
        self.revision = revision
        self.kept: CheckpointHeaders | None = None
        """Headers read before; they are those of a commit and can't change."""
        self._lock = threading.Lock()
        self._listed: _Listing | None = None
        self._branch_kept = False
        self._heads: dict[str, bytes] = {}

    # -- what there is -------------------------------------------------------------------------

    @property
    def commit(self) -> str:
        """The commit that all reads are of."""
        return self._listing().commit

    @property
    def offline(self) -> bool:
        """Whether the files are those of the local cache because the network is switched off."""
        return self._listing().snapshot is not None

    def names(self) -> list[str]:
        """Names of the files at the top of the repository."""
        return sorted(name for name in self._listing().sizes if "/" not in name)

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return name in self._listing().sizes

    def size(self, name: str) -> int:
        """Bytes of a file."""
        self._known(name)
        if self._listing().sizes[name] is None:
            self._head(name, _FIRST)
        size = self._listing().sizes[name]
        if size is None:
            raise HubError(codes.HUB_RANGE(name, "the Hub does not tell its size", "try again"))
        return size

    def describe(self) -> str:
        """``org/name@revision``."""
        return f"{self.repo_id}@{self.revision}"

    def identity(self) -> str:
        """``org/name@commit``: a branch may move, a commit does not."""
        return f"{self.repo_id}@{self.commit}"

    def not_cached(self, name: str) -> Finding:
        """Why a file cannot be had offline."""
        return codes.HUB_OFFLINE(
            f"{self.describe()}: {name}",
            "the network is switched off (HF_HUB_OFFLINE) and the local cache lacks it",
            "unset HF_HUB_OFFLINE once to download it, or give a local folder",
        )

    def _known(self, name: str) -> None:
        if not self.exists(name):
            if self.offline:
                raise HubError(self.not_cached(name))
            raise HubError(
                codes.HUB_NOT_FOUND(
                    f"{self.describe()}: {name}",
                    "the repository has no such file",
                    "check the name of the file and the revision",
                )
            )

    def _listing(self) -> _Listing:
        with self._lock:
            if self._listed is None:
                self._listed = self._list()
            return self._listed

    def _list(self) -> _Listing:
        from huggingface_hub import HfApi, constants

        try:
            info = attempt(
                lambda: HfApi().model_info(
                    self.repo_id,
                    revision=self.revision,
                    files_metadata=True,
                    timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                ),
                self.describe(),
            )
        except HubError as error:
            if error.findings[0].code != codes.HUB_OFFLINE.code:
                raise
            return self._cached(error)
        sizes = {item.rfilename: item.size for item in info.siblings or ()}
        return _Listing(info.sha or self.revision, sizes)

    def _cached(self, error: HubError) -> _Listing:
        """The cached snapshot of the revision, or ``error``."""
        from huggingface_hub import constants, scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
        except CacheNotFound:
            raise error from None
        for repository in repositories:
            if repository.repo_type != "model" or repository.repo_id != self.repo_id:
                continue
            for found in repository.revisions:
                if self.revision in found.refs or self.revision == found.commit_hash:
                    folder = FolderSource(found.snapshot_path)
                    sizes: dict[str, int | None] = {
                        name: folder.size(name) for name in folder.names()
                    }
                    return _Listing(found.commit_hash, sizes, folder)
        raise error

    # -- bytes ---------------------------------------------------------------------------------

    def read(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a file, from the cache or by range requests.

        Raises:
            HubError: ``QM-CKPT-040`` to ``044``, the Hub does not give them.
        """
        self._known(name)
        size = self.size(name)
        stop = min(stop, size)
        if stop <= start:
            return b""
        local = self._local(name)
        if local is not None:
            return local.read(name, start, stop)
        if start >= _FIRST:
            return self._range(name, start, stop)
        head = self._head(name, stop if start == 0 else _FIRST)
        if start or stop == size:  # The header after its length, or all of it: no more will come.
            self._heads.pop(name, None)
        if stop > len(head):
            head += self._range(name, len(head), stop)
        return head[start:stop]

    def local_path(self, name: str) -> Path:
        """Download the file into the Hub's cache, unless it is there."""
        from huggingface_hub import hf_hub_download

        self._known(name)
        local = self._local(name)
        if local is not None:
            return local.local_path(name)
        self._keep_branch()
        where = f"{self.describe()}: {name}"
        # hf_hub_download makes further attempts itself.
        path = attempt(lambda: hf_hub_download(self.repo_id, name, revision=self.commit), where, ())
        return Path(path)

    def _keep_branch(self) -> None:
        """Let the cache know the branch's commit, so that the branch can be used offline.

        The cache learns it only from a download by the branch's name. The weights are asked for
        by their commit, since the branch may move meanwhile; the smallest file serves for this.
        """
        from huggingface_hub import hf_hub_download

        listing = self._listing()
        with self._lock:
            if self._branch_kept or self.revision == listing.commit:
                return
            smallest = min(listing.sizes, key=lambda name: (listing.sizes[name] or 0, name))
            where = f"{self.describe()}: {smallest}"
            attempt(
                lambda: hf_hub_download(self.repo_id, smallest, revision=self.revision), where, ()
            )
            self._branch_kept = True

    def _local(self, name: str) -> FolderSource | None:
        """The folder where the file lies already, if it does."""
        from huggingface_hub import try_to_load_from_cache

        listing = self._listing()
        if listing.snapshot is not None:
            return listing.snapshot
        found = try_to_load_from_cache(self.repo_id, name, revision=listing.commit)
        # The answer may also be None (not known) or a sentinel (known not to exist).
        if not isinstance(found, str) or not Path(found).is_file():
            return None
        return FolderSource(Path(found.removesuffix(name)))

    def _head(self, name: str, atleast: int) -> bytes:
        """The first bytes of a file, kept until its header was read."""
        head = self._heads.get(name)
        if head is None:
            size = self._listing().sizes[name]
            stop = max(_FIRST, atleast)
            head = self._range(name, 0, stop if size is None else min(stop, size))
            self._heads[name] = head
        return head

    def _range(self, name: str, start: int, stop: int) -> bytes:
        return attempt(lambda: self._request(name, start, stop), f"{self.describe()}: {name}")

    def _request(self, name: str, start: int, stop: int) -> bytes:
        from huggingface_hub import hf_hub_url, utils

        public: Any = utils  # Its documented functions are exported without a type.
        listing = self._listing()
        url = hf_hub_url(self.repo_id, name, revision=listing.commit)
        headers = {
            **public.build_hf_headers(library_name="quantmill"),
            "Range": f"bytes={start}-{stop - 1}",
            "Accept-Encoding": "identity",  # Offsets are those of the file, not of an encoding.
        }
        with stream(url, headers) as (response, chunks):
            public.hf_raise_for_status(response)
            skip, end = self._check(name, start, stop, response)
            data = take(chunks, skip, end - start)
        if len(data) != end - start:
            self._bad_range(name, f"it ended after {len(data)} of {end - start} bytes")
        return data

    def _check(self, name: str, start: int, stop: int, response: Any) -> tuple[int, int]:
        """Bytes to skip in an answer, and the offset in the file where it ends."""
        sizes = self._listing().sizes
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            self._bad_range(name, f"it is encoded ({encoding})")
        if response.status_code == 200:
            if start > _SKIP:
                self._bad_range(name, f"it is the whole file instead of bytes {start} to {stop}")
            length = str(response.headers.get("Content-Length"))
            size = self._agree(name, int(length)) if length.isdigit() else sizes[name]
            return start, stop if size is None else min(stop, size)
        stated = str(response.headers.get("Content-Range"))
        found = _CONTENT_RANGE.fullmatch(stated)
        if response.status_code != 206 or found is None:
            self._bad_range(name, f"it has status {response.status_code} and range {stated!r}")
        first, end = int(found[1]), int(found[2]) + 1
        total = None if found[3] == "*" else int(found[3])
        if total is not None:
            self._agree(name, total)
        if first != start or end > stop or (end < stop and end != total):
            self._bad_range(name, f"it is {stated!r}, wanted were the bytes {start} to {stop}")
        return 0, end

    def _agree(self, name: str, total: int) -> int:
        """The size of a file as an answer says, which must be the one that was listed."""
        sizes = self._listing().sizes
        if sizes[name] not in (None, total):
            self._bad_range(name, f"the file has {total} bytes, {sizes[name]} were listed")
        sizes[name] = total
        return total

    def _bad_range(self, name: str, cause: str) -> NoReturn:
        where = f"{self.describe()}: {name}"
        fix = "try again; a proxy or mirror may be at fault, then download the repository first"
        raise HubError(codes.HUB_RANGE(where, f"the Hub's answer is wrong: {cause}", fix))
