"""The journal: every job the agent has accepted, durable before it is acknowledged.

One SQLite file, one connection, one lock. SQLite before 3.51.3 can corrupt a
database in WAL mode that two connections reset at the same time
(https://sqlite.org/wal.html, "the WAL-reset bug"), and Debian 12 ships 3.40;
with a single connection there is nobody to race with.

Each transition of a job and the event that tells of it are one transaction, so
the event stream never says more or less than the jobs do. Every transaction is
synced. A phase that a job has come to waits for the next one, or for somebody to
ask: what has been told lasts, and a boot that nobody watches is written down twice,
when it is accepted and when it has ended.
"""

import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agent.errors import (
    BackendError,
    BootwrightError,
    IdempotencyConflict,
    InsufficientFreeSpace,
    NotFound,
)
from agent.job import JobRequest
from agent.report import JobReport, Status
from agent.views import Event

LOG = logging.getLogger(__name__)

_SCHEMA_VERSION = 2
# Each index is one more page in the write-ahead log of every transition.
_SCHEMA = """
CREATE TABLE job (
    number          INTEGER PRIMARY KEY,
    id              TEXT NOT NULL UNIQUE,
    idempotency_key TEXT,
    body_digest     TEXT NOT NULL,
    status          TEXT NOT NULL,
    created_at      REAL NOT NULL,
    request         TEXT NOT NULL,
    report          TEXT NOT NULL,
    cancelled       TEXT
);
CREATE INDEX job_status ON job (status);
CREATE UNIQUE INDEX job_key ON job (idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE TABLE event (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id     TEXT NOT NULL,
    time       REAL NOT NULL,
    status     TEXT NOT NULL,
    task_state TEXT,
    message    TEXT NOT NULL
);
"""
# To each version from the one before. What is left of version 1 beside is in nobody's way.
_MIGRATIONS = {2: "DROP INDEX event_job;"}
_UNFINISHED = tuple(status for status in Status if not status.final)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row: what was asked, and what has come of it so far."""

    request: JobRequest
    report: JobReport
    cancelled: str | None = None
    """Why it shall end, once somebody has asked for that."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Transition:
    report: JobReport
    message: str
    time: float
    """Seconds since the epoch."""


class Journal:
    """May be shared by any number of threads; by one process only."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Open or create the journal at `path`.

        Raises:
            JournalUnusable: the file is no journal, or of a newer release.
        """
        self._path = path
        self._now = now
        self._lock = threading.RLock()
        # Transitions that are not in the file yet, in their order.
        self._announced: list[_Transition] = []
        self.changed = threading.Condition(self._lock)
        try:
            # It holds user data, whatever the umask is.
            path.touch(mode=0o600)
            path.chmod(0o600)
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10
            )
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._migrate(path)
        except OSError as e:
            raise JournalUnusable(
                f"the journal {path} cannot be opened: {e.strerror}; it and {path.parent} have to "
                "belong to the agent's user"
            ) from e
        except sqlite3.Error as e:
            raise JournalUnusable(
                f"the journal {path} cannot be used: {e}; another agent may be running on the "
                "same state_path; otherwise move the file away (unfinished jobs in it are lost)"
            ) from e

    def _migrate(self, path: Path) -> None:
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        if version > _SCHEMA_VERSION:
            raise JournalUnusable(
                f"the journal {path} was written by a newer release (schema {version}, this one "
                f"knows {_SCHEMA_VERSION}); install that release again"
            )
        steps = [_SCHEMA] if version == 0 else []
        if version:
            steps += [_MIGRATIONS[to] for to in range(version + 1, _SCHEMA_VERSION + 1)]
        if steps:
            self._connection.executescript(
                f"BEGIN IMMEDIATE;{''.join(steps)}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;"
            )

    def close(self) -> None:
        with self._lock:
            try:
                self._write_announced()
            except BootwrightError as e:
                LOG.warning("where the running jobs were is not recorded: %s", e)
            self._connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """Commit what the block does, after what was announced before; it is durable then.

        Raises:
            InsufficientFreeSpace, BackendError: it could not be made durable.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    _write(self._connection, self._announced)
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    # SQLite itself may have rolled back, when the disk was full.
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as e:
                raise self._unwritable(e) from e
            self._announced.clear()
            self.changed.notify_all()

    def _write_announced(self) -> None:
        if self._announced:
            with self._transaction():
                pass

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to who tells others what it reads: that has to last."""
        with self._lock:
            # What cannot be written is not told yet; the rest is.
            with contextlib.suppress(BootwrightError):
                self._write_announced()
            yield self._connection

    def _unwritable(self, error: sqlite3.Error) -> BootwrightError:
        if error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL:
            return InsufficientFreeSpace(
                f"the journal {self._path} cannot be written: {error}",
                f"free space below {self._path.parent}",
            )
        return BackendError(
            f"the journal {self._path} cannot be written: {error}",
            "check the file system and the kernel's log",
        )

    def accept(self, request: JobRequest, report: JobReport, *, body_digest: str) -> JobReport:
        """Make the job durable; with a known idempotency key, return the job that has it.

        `body_digest` is `digest_of` what the caller sent, before anything was
        filled in.

        Raises:
            IdempotencyConflict: the key belongs to a job with another body.
        """
        with self._transaction() as db:
            if request.idempotency_key is not None:
                known = _by_key(db, request.idempotency_key, body_digest)
                if known is not None:
                    return known
            db.execute(
                "INSERT INTO job (id, idempotency_key, body_digest, status, created_at,"
                " request, report) VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    report.id,
                    request.idempotency_key,
                    body_digest,
                    report.status,
                    report.created_at,
                    request.model_dump_json(),
                    report.model_dump_json(),
                ),
            )
            _insert_event(db, self._transition(report, f"{report.action} accepted"))
        return report

    def by_key(self, key: str, body_digest: str) -> JobReport | None:
        """Return the job that has the idempotency key, if there is one.

        Raises:
            IdempotencyConflict: the key belongs to a job with another body.
        """
        with self._lock:
            return _by_key(self._connection, key, body_digest)

    def announce(self, report: JobReport, message: str) -> None:
        """Tell the job's new state, and `message`, to whoever asks; durable from then on.

        A crash takes it back if nobody has asked, and nothing has been recorded since. `get`
        is no such question: it says where one job is this moment.
        """
        with self._lock:
            self._announced.append(self._transition(report, message))
            self.changed.notify_all()

    def record(self, report: JobReport, message: str) -> None:
        """Make the job's new state durable, and tell `message` to whoever follows events."""
        with self._lock:
            self._announced.append(self._transition(report, message))
            try:
                self._write_announced()
            except BaseException:
                # Whoever is told so tries it again, or goes another way. What cannot be
                # written at all must not stand in the way of all others.
                self._announced.pop()
                raise

    def _transition(self, report: JobReport, message: str) -> _Transition:
        return _Transition(report=report, message=message, time=self._now())

    def cancel(self, job_id: str, message: str) -> None:
        """Make it durable that the job shall end; the first message given stays."""
        with self._transaction() as db:
            db.execute(
                "UPDATE job SET cancelled = coalesce(cancelled, ?) WHERE id = ?", (message, job_id)
            )

    def get(self, job_id: str) -> Job:
        """Return a job as it is by now; a phase it has come to may be announced only.

        Raises:
            NotFound
        """
        with self._lock:
            row = self._connection.execute(
                "SELECT request, report, cancelled FROM job WHERE id = ?", (job_id,)
            ).fetchone()
            announced = [each.report for each in self._announced if each.report.id == job_id]
        if row is None:
            raise NotFound(
                f"there is no job {job_id!r} on this host", "bootwright job list shows them"
            )
        job = _job(row)
        return replace(job, report=announced[-1]) if announced else job

    def jobs(self, statuses: Sequence[Status] = tuple(Status)) -> list[Job]:
        """Return the jobs in one of `statuses`, in the order they were accepted."""
        marks = ", ".join("?" * len(statuses))
        with self._reading() as db:
            rows = db.execute(
                f"SELECT request, report, cancelled FROM job WHERE status IN ({marks}) "  # noqa: S608
                "ORDER BY number",
                tuple(statuses),
            ).fetchall()
        return [_job(row) for row in rows]

    def unfinished(self) -> list[Job]:
        return self.jobs(_UNFINISHED)

    def unfinished_before(self, job_id: str, *, instance_uuid: str) -> list[Job]:
        """Return the unfinished jobs of an instance that were accepted before `job_id`."""
        marks = ", ".join("?" * len(_UNFINISHED))
        with self._lock:
            rows = self._connection.execute(
                f"SELECT request, report, cancelled FROM job WHERE status IN ({marks}) "  # noqa: S608
                "AND number < (SELECT number FROM job WHERE id = ?) "
                "AND json_extract(request, '$.instance.uuid') = ? ORDER BY number",
                (*_UNFINISHED, job_id, instance_uuid),
            ).fetchall()
        return [_job(row) for row in rows]

    def counts(self) -> dict[Status, int]:
        """Return how many jobs there are of each status."""
        with self._reading() as db:
            rows = db.execute("SELECT status, count(*) FROM job GROUP BY status").fetchall()
        return {Status(status): count for status, count in rows}

    def events(self, since: int, *, limit: int = 1000) -> list[Event]:
        """Return up to `limit` events after number `since`."""
        with self._reading() as db:
            rows = db.execute(
                "SELECT seq, time, job_id, status, task_state, message FROM event "
                "WHERE seq > ? ORDER BY seq LIMIT ?",
                (since, limit),
            ).fetchall()
        return [
            Event(
                seq=seq,
                time=at,
                job_id=job_id,
                status=status,
                task_state=task_state,
                message=message,
            )
            for seq, at, job_id, status, task_state, message in rows
        ]

    def last_event(self) -> int:
        """Return the number of the newest event, 0 if there is none."""
        with self._reading() as db:
            (seq,) = db.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()
        return int(seq)

    def forget(self, *, older_than_s: float) -> int:
        """Remove final jobs accepted that long ago, with their events; return how many."""
        final = [status for status in Status if status.final]
        marks = ", ".join("?" * len(final))
        with self._transaction() as db:
            cursor = db.execute(
                f"DELETE FROM job WHERE created_at < ? AND status IN ({marks})",  # noqa: S608
                (self._now() - older_than_s, *final),
            )
            if cursor.rowcount:
                db.execute("DELETE FROM event WHERE job_id NOT IN (SELECT id FROM job)")
            return cursor.rowcount


def _write(db: sqlite3.Connection, transitions: Sequence[_Transition]) -> None:
    newest = {transition.report.id: transition.report for transition in transitions}
    for report in newest.values():
        db.execute(
            "UPDATE job SET report = ?, status = ? WHERE id = ?",
            (report.model_dump_json(), report.status, report.id),
        )
    for transition in transitions:
        _insert_event(db, transition)


def _insert_event(db: sqlite3.Connection, transition: _Transition) -> None:
    report = transition.report
    db.execute(
        "INSERT INTO event (job_id, time, status, task_state, message) VALUES (?, ?, ?, ?, ?)",
        (report.id, transition.time, report.status, report.task_state, transition.message),
    )


class JournalUnusable(Exception):
    """The journal cannot be opened; the agent does not start without it."""


def digest_of(request: JobRequest) -> str:
    """Return what decides whether two requests have the same body; nothing if they have no key.

    The key and the request id are the envelope, not the body: a client that
    tries again with a new request id means the same job.
    """
    if request.idempotency_key is None:
        return ""
    body = request.model_dump(mode="json", exclude={"idempotency_key", "request_id"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _by_key(db: sqlite3.Connection, key: str, body_digest: str) -> JobReport | None:
    row = db.execute(
        "SELECT id, body_digest, report FROM job WHERE idempotency_key = ?", (key,)
    ).fetchone()
    if row is None:
        return None
    job_id, known_digest, report = row
    if known_digest != body_digest:
        raise IdempotencyConflict(
            f"the idempotency key {key!r} belongs to job {job_id}, which asked for something else",
            "send the same body again, or take a new key for a new job",
        )
    return JobReport.model_validate_json(report)


def _job(row: tuple[str, str, str | None]) -> Job:
    request, report, cancelled = row
    return Job(
        request=JobRequest.model_validate_json(request),
        report=JobReport.model_validate_json(report),
        cancelled=cancelled,
    )
