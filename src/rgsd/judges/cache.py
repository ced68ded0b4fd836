"""Caches the judge's replies on disk, so that no reply is paid for twice, however the last process ended.

One SQLite file in write-ahead mode holds JSON values, and no pickles. Before a process requests a reply, it claims the
key of the reply; other processes that need the same reply wait for it. A claim is a short lease that its owner renews,
so the claim of a dead process expires, and immediately if its death can be observed.

If the file cannot be written (a full disk), replies stay in memory, and are written as soon as that works again.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from rgsd.errors import JudgeError
from rgsd.progress import say
from rgsd.redaction import redact_known

LEASE = 30.0
"""Seconds until a claim expires unless it is renewed: the longest wait for a process whose death cannot be observed."""
LONGEST_LEASE = 4 * LEASE
"""Claims of another machine that end later than this many seconds from now are void: its clock is wrong."""
RENEW_EVERY = 5.0
"""Seconds between renewals of this process's claims."""
LOCK_TIMEOUT = 10.0
"""Seconds to wait while another process locks the file."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT NOT NULL, created REAL NOT NULL);
CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, machine TEXT NOT NULL,
                                   pid INTEGER NOT NULL, started TEXT NOT NULL, until REAL NOT NULL);
CREATE TABLE IF NOT EXISTS unusable (key TEXT PRIMARY KEY, replies TEXT NOT NULL);
"""


class Holder(NamedTuple):
    """The holder of a claim.

    A pid alone does not identify a process: pids are reused, and in every container the first process has pid 1.

    Args:
        owner: A random id of one opened cache.
        machine: As from `_machine`.
        pid: The process.
        started: When it started, as from `_start_of`.
    """

    owner: str
    machine: str
    pid: int
    started: str

    def is_dead(self, machine: str) -> bool:
        """Whether the process is known to have ended. False if that cannot be observed from `machine`."""
        return self.machine == machine and _start_of(self.pid) != self.started


class ReplyCache:
    """Maps keys to replies, in a file that processes share. For use from one thread.

    Raises:
        JudgeError: If the file cannot be opened or read, is not such a cache, or stays locked by another process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._me = Holder(uuid.uuid4().hex, _machine(), os.getpid(), _start_of(os.getpid()) or "")
        self._unwritten: dict[str, str] = {}
        self._is_faulty = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # isolation_level=None disables Python's implicit transactions. A single thread uses the cache, but another
            # one opens it.
            self._db = sqlite3.connect(path, timeout=LOCK_TIMEOUT, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            # A commit survives the death of the process, and only a power failure can lose the last ones. Waiting for
            # the disk at each commit would delay replies that arrive meanwhile, and a kill would lose those.
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            self._db.execute("SELECT key, reply FROM replies LIMIT 1").fetchone()
            # Opening may wait long for another process. Later calls run on the event loop, and must not block it.
            self._db.execute("PRAGMA busy_timeout=1000")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    def get(self, key: str) -> dict[str, Any] | None:
        """The reply for a key, or None. A damaged reply counts as missing.

        Raises:
            JudgeError: If the file cannot be read.
        """
        text = self._unwritten.get(key)
        if text is None:
            row = self._read("SELECT reply FROM replies WHERE key = ?", (key,))
            text = None if row is None else row[0]
        try:
            reply = json.loads(text) if isinstance(text, str | bytes) else None
        except (ValueError, RecursionError):
            return None
        return reply if isinstance(reply, dict) and isinstance(reply.get("text"), str) else None

    def claim(self, key: str, seconds: float | None = None) -> bool:
        """Claim the right to request a reply.

        Args:
            key: The reply's key.
            seconds: How long the claim lasts after the last `renew`, unless `put` or `release` ends it. None means
                `LEASE`.

        Returns:
            False if another live process holds the claim. True if the file cannot be written: paying twice is better
            than not judging at all.
        """
        now = time.time()

        def work() -> bool:
            row = self._db.execute("SELECT owner, machine, pid, started, until FROM leases WHERE key = ?", (key,))
            lease = row.fetchone()
            if lease is not None and _is_live(lease, now, self._me.machine):
                return False
            until = now + (LEASE if seconds is None else seconds)
            self._db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)", (key, *self._me, until))
            return True

        won = self._write(work)
        return True if won is None else won

    def renew(self) -> None:
        """Renew this process's claims, and write what could not be written before."""
        until = time.time() + LEASE
        self._write(
            # MAX keeps claims that were made for longer.
            lambda: self._db.execute("UPDATE leases SET until = MAX(until, ?) WHERE owner = ?", (until, self._me.owner))
        )
        self._write_rest()

    def holder(self, key: str) -> str:
        """The holder of a claim, in words."""
        row = self._read("SELECT machine, pid FROM leases WHERE key = ?", (key,))
        return "another process" if row is None else f"process {row[1]} on {str(row[0]).split(':')[0]}"

    def put(self, key: str, reply: dict[str, Any]) -> None:
        """Store a reply and give up the claim. If the file cannot be written, the reply stays in memory."""
        self._unwritten[key] = redact_known(json.dumps(reply))
        self._write_rest()

    def unusable(self, key: str) -> list[dict[str, Any]]:
        """The unusable replies of a process that was killed before it could ask again."""
        row = self._read("SELECT replies FROM unusable WHERE key = ?", (key,))
        try:
            replies = json.loads(row[0]) if row is not None else []
        except (ValueError, TypeError, RecursionError):
            return []
        fields = {"text", "code", "finish_reason", "is_refusal"}
        is_valid = isinstance(replies, list) and all(
            isinstance(r, dict)
            and set(r) == fields
            and all(isinstance(r[name], str) for name in ("text", "code"))
            and isinstance(r["finish_reason"], str | None)
            and isinstance(r["is_refusal"], bool)
            for r in replies
        )
        return replies if is_valid else []

    def put_unusable(self, key: str, replies: list[dict[str, Any]]) -> None:
        """Store the unusable replies so far. An empty list deletes them."""
        text = redact_known(json.dumps(replies))

        def work() -> bool:
            self._db.execute("DELETE FROM unusable WHERE key = ?", (key,))
            if replies:
                self._db.execute("INSERT INTO unusable VALUES (?, ?)", (key, text))
            return True

        self._write(work)

    def release(self, key: str) -> None:
        """Give up a claim without a reply."""
        self._write(lambda: self._db.execute("DELETE FROM leases WHERE key = ? AND owner = ?", (key, self._me.owner)))

    def close(self) -> None:
        """Close the file, and warn if paid replies could not be written."""
        self._write_rest()
        if self._unwritten:
            say(
                f"  {len(self._unwritten)} replies could not be written to the judge's cache {self.path}: their "
                "judgements are kept, but judging the same responses again pays for them again"
            )
            self._unwritten.clear()
        self._db.close()

    def _write_rest(self) -> None:
        if not self._unwritten:
            return
        rest = dict(self._unwritten)

        def work() -> bool:
            for key, text in rest.items():
                self._db.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?)", (key, text, time.time()))
                self._db.execute("DELETE FROM unusable WHERE key = ?", (key,))
                self._db.execute("DELETE FROM leases WHERE key = ? AND owner = ?", (key, self._me.owner))
            return True

        if self._write(work):
            self._unwritten.clear()
            self._is_faulty = False

    def _write(self, work: Callable[[], Any]) -> Any:
        """Do the work in one transaction. Returns None if the file cannot be written, and warns the first time."""
        try:
            # IMMEDIATE takes the write lock at once, so no other process can claim between our read and our write.
            self._db.execute("BEGIN IMMEDIATE")
            done = work()
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):  # SQLite may have rolled back already
                    self._db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.Error):
                raise
            if not self._is_faulty:
                say(f"  the judge's cache {self.path} cannot be written ({error}): replies stay in memory for now")
            self._is_faulty = True
            return None
        return done

    def _read(self, query: str, values: tuple[Any, ...]) -> Any:
        until = time.monotonic() + LOCK_TIMEOUT
        while True:
            try:
                return self._db.execute(query, values).fetchone()
            except sqlite3.Error as error:
                if not _is_locked(error) or time.monotonic() > until:
                    raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> JudgeError:
        remedy = (
            "end the process that locks it"
            if _is_locked(error)
            else "free some space, or choose a writable folder"
            if isinstance(error, OSError) or "full" in str(error) or "readonly" in str(error)
            else "move the file away (its replies are lost)"
        )
        return JudgeError(
            f"the judge's cache {self.path} cannot be used ({error}): {remedy}, or set judge_cache to another file or "
            "to `off`"
        )


def _is_locked(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def _machine() -> str:
    """Host, boot and pid namespace. Two processes with the same three can observe each other."""
    parts = [socket.gethostname()]
    try:
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:  # there is no /proc on macOS and Windows
        pass
    return ":".join(parts)


def _is_live(lease: tuple[Any, ...], now: float, machine: str) -> bool:
    """Whether a row of a claim holds. A damaged one does not, and neither does one of a clock that is far ahead."""
    owner, where, pid, started, until = lease
    if not (isinstance(until, int | float) and isinstance(pid, int) and 0 < pid < 2**31):
        return False
    if where != machine:
        return now <= until <= now + LONGEST_LEASE
    return now <= until and not Holder(owner, where, pid, started).is_dead(machine)


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in the system's own unit.

    Returns:
        "" if the system does not tell. None if the process has ended, even if its parent has not collected it yet.
    """
    try:
        os.kill(pid, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        # The name in field 2 may contain spaces and parentheses. After it: state first, start time as field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        return ""
