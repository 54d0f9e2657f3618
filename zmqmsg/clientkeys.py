"""The public keys of the clients that are let in: a file or a directory of them."""

import math
import os
import stat
import time
from typing import NamedTuple

from zmqmsg.keyfiles import KeyFileError, load_public_key
from zmqmsg.notices import Notify, notify
from zmqmsg.system import SHORTAGES

REST_FACTOR = 5  # after a scan, rest for this many times as long as it took
SETTLE_TIME = 1.0  # seconds without a change after which keys are no longer being changed

Fingerprint = tuple[int, ...]


class KeyFile(NamedTuple):
    """A file of client keys, as it was read."""

    fingerprint: Fingerprint
    public: bytes  # in Z85; empty if the file holds no public key
    fault: str  # why it holds none


class ClientKeys:
    """The public keys in a file, or in the files of a directory, as they are now.

    A known key counts while its file is unchanged, which takes one call of stat(). Any other key
    costs a scan of all files, and scans have a share of the time, so that strangers cannot keep
    clients waiting.
    """

    def __init__(self, path: str, notify_later: Notify) -> None:
        """Read the keys at ``path``; raise KeyFileError if nothing is there that can be read.

        ``notify_later``: gives notices from the thread that calls ``scan_if_due``.
        """
        self.error: OSError | None = None  # why the last scan failed
        self.scanned_at = -math.inf  # when the last scan began that did not fail
        self.changed_at = -math.inf  # when a scan has last found a change
        self._path = path
        self._is_directory = os.path.isdir(path)
        self._files: dict[str, KeyFile] = {}
        self._path_of_key: dict[bytes, str] = {}
        self._reported: set[KeyFile] = set()
        self._next_scan_at = -math.inf
        self._notify = notify_later
        check_path(path)
        self._scan()
        if self.error:
            raise KeyFileError(f"cannot read {path}: {self.error.strerror}") from self.error
        for file in self._files.values():
            if file.fault:
                notify(f"{file.fault}; it is ignored", "yellow")
                self._reported.add(file)
        if not self._path_of_key:
            notify(f"no client can connect until there is a public key in {path}", "yellow")

    def find(self, public: bytes) -> str | None:
        """Return the name of the unchanged file that holds ``public`` (Z85), or None."""
        path = self._path_of_key.get(public)
        if not path or fingerprint_of(path) != self._files[path].fingerprint:
            return None
        return os.path.basename(path)

    def scan_if_due(self) -> None:
        """Look at all files again, unless the last scan is too recent; notify of what is wrong."""
        if time.monotonic() < self._next_scan_at:
            return
        last_error = self.error
        self._scan()
        if self.error and not last_error:
            self._notify(
                f"cannot read the client keys in {self._path}: {self.error.strerror};"
                " clients have to wait until that is over",
                "yellow",
            )
        elif last_error and not self.error:
            self._notify("the client keys can be read again", "cyan")

    def has_settled(self) -> bool:
        """Return whether the keys can be read, and have not changed for a second."""
        return not self.error and time.monotonic() - self.changed_at >= SETTLE_TIME

    def _scan(self) -> None:
        """Read the keys as they are now. If that fails, keep the old ones, and note the error."""
        began_at = time.monotonic()
        try:
            files = {path: self._read(path) for path in self._list()}
        except OSError as error:
            self.error = error
            self.scanned_at = -math.inf  # nobody is refused on the strength of an older scan
        else:
            self.error = None
            self.scanned_at = began_at
            self._report_faults(files)
            if files != self._files:
                self.changed_at = began_at
                self._files = files
                self._path_of_key = {
                    file.public: path for path, file in files.items() if file.public
                }
        ended_at = time.monotonic()
        self._next_scan_at = ended_at + REST_FACTOR * (ended_at - began_at)

    def _list(self) -> list[str]:
        """Return the paths of all files; raise OSError if what the user gave has gone."""
        if not self._is_directory:
            os.stat(self._path)
            return [self._path]
        with os.scandir(self._path) as entries:
            # Names that begin with a dot are those of drafts, and of the links by which
            # containers get their secrets. If files hold the same key, the last name counts.
            return sorted(entry.path for entry in entries if not entry.name.startswith("."))

    def _read(self, path: str) -> KeyFile:
        """Return what a file holds; raise OSError if that cannot be known just now."""
        fingerprint = fingerprint_of(path)
        known = self._files.get(path)
        if known and known.fingerprint == fingerprint:
            return known
        if not fingerprint:  # it has just been removed
            return KeyFile(fingerprint, b"", "")
        try:
            return KeyFile(fingerprint, load_public_key(path, fifo=False), "")
        except KeyFileError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno in SHORTAGES:
                raise cause from None
            return KeyFile(fingerprint, b"", str(error))

    def _report_faults(self, files: dict[str, KeyFile]) -> None:
        """Notify of each file that held no key in two scans, and did not change in between."""
        for path, file in files.items():
            if file.fault and file == self._files.get(path) and file not in self._reported:
                self._notify(f"{file.fault}; it is ignored", "yellow")
                self._reported.add(file)


def check_path(path: str) -> None:
    """Raise KeyFileError if client keys cannot be read from ``path`` again and again."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        raise KeyFileError(
            f"{path} does not exist; pass a public key file, or a directory of them"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot read {path}: {error.strerror}") from error
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise KeyFileError(
            f"{path} can be read only once, and client keys are read again for each client;"
            " pass a file or directory"
        )


def fingerprint_of(path: str) -> Fingerprint:
    """Return what changes whenever the contents of the file do; nothing if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return ()
    # On Windows, ctime is the time of creation; elsewhere, mtime can be set back.
    return status.st_ino, status.st_size, status.st_ctime_ns, status.st_mtime_ns
