"""The journal: every job the agent has accepted, durable before it is acknowledged.

One SQLite file, one connection, one lock. SQLite before 3.51.3 can corrupt a
database in WAL mode that two connections reset at the same time
(https://sqlite.org/wal.html, "the WAL-reset bug"), and Debian 12 ships 3.40;
with a single connection there is nobody to race with.

Each transition of a job and the event that tells of it are one transaction, so
the event stream never says more or less than the jobs do.
"""

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.errors import IdempotencyConflict, NotFound
from agent.job import JobRequest
from agent.report import JobReport, Status
from agent.views import Event

_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE job (
    number          INTEGER PRIMARY KEY AUTOINCREMENT,
    id              TEXT NOT NULL UNIQUE,
    idempotency_key TEXT UNIQUE,
    body_digest     TEXT NOT NULL,
    status          TEXT NOT NULL,
    created_at      REAL NOT NULL,
    request         TEXT NOT NULL,
    report          TEXT NOT NULL
);
CREATE INDEX job_status ON job (status);
CREATE TABLE event (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id     TEXT NOT NULL REFERENCES job (id) ON DELETE CASCADE,
    time       REAL NOT NULL,
    status     TEXT NOT NULL,
    task_state TEXT,
    message    TEXT NOT NULL
);
CREATE INDEX event_job ON event (job_id);
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One row: what was asked, and what has come of it so far."""

    request: JobRequest
    report: JobReport


class Journal:
    """May be shared by any number of threads; by one process only."""

    def __init__(self, path: Path, *, now: Callable[[], float] = time.time) -> None:
        """Open or create the journal at `path`.

        Raises:
            JournalUnusable: the file is no journal, or of a newer release.
        """
        self._now = now
        self._lock = threading.RLock()
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
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._migrate(path)
        except (sqlite3.Error, OSError) as e:
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
        if version == 0:
            self._connection.executescript(
                f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {_SCHEMA_VERSION};COMMIT;"
            )

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self.changed.notify_all()

    def accept(self, request: JobRequest, report: JobReport, *, body_digest: str) -> JobReport:
        """Make the job durable; with a known idempotency key, return the job that has it.

        `body_digest` is `digest_of` what the caller sent, before anything was
        filled in.

        Raises:
            IdempotencyConflict: the key belongs to a job with another body.
        """
        with self._transaction() as db:
            if request.idempotency_key is not None:
                row = db.execute(
                    "SELECT id, body_digest, report FROM job WHERE idempotency_key = ?",
                    (request.idempotency_key,),
                ).fetchone()
                if row is not None:
                    return _same_job(request.idempotency_key, row, body_digest)
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
            self._insert_event(db, report, f"{report.action} accepted")
        return report

    def record(self, report: JobReport, message: str) -> None:
        """Make the job's new state durable, and tell `message` to whoever follows events."""
        with self._transaction() as db:
            db.execute(
                "UPDATE job SET status = ?, report = ? WHERE id = ?",
                (report.status, report.model_dump_json(), report.id),
            )
            self._insert_event(db, report, message)

    def _insert_event(self, db: sqlite3.Connection, report: JobReport, message: str) -> None:
        db.execute(
            "INSERT INTO event (job_id, time, status, task_state, message) VALUES (?, ?, ?, ?, ?)",
            (report.id, self._now(), report.status, report.task_state, message),
        )

    def get(self, job_id: str) -> Job:
        """Raises: NotFound."""
        with self._lock:
            row = self._connection.execute(
                "SELECT request, report FROM job WHERE id = ?", (job_id,)
            ).fetchone()
        if row is None:
            raise NotFound(
                f"there is no job {job_id!r} on this host", "bootwright job list shows them"
            )
        return _job(row)

    def jobs(self, statuses: Sequence[Status] = tuple(Status)) -> list[Job]:
        """Return the jobs in one of `statuses`, in the order they were accepted."""
        marks = ", ".join("?" * len(statuses))
        with self._lock:
            rows = self._connection.execute(
                f"SELECT request, report FROM job WHERE status IN ({marks}) "  # noqa: S608 (marks)
                "ORDER BY number",
                tuple(statuses),
            ).fetchall()
        return [_job(row) for row in rows]

    def unfinished(self) -> list[Job]:
        return self.jobs([status for status in Status if not status.final])

    def counts(self) -> dict[Status, int]:
        """Return how many jobs there are of each status."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT status, count(*) FROM job GROUP BY status"
            ).fetchall()
        return {Status(status): count for status, count in rows}

    def events(self, since: int, *, limit: int = 1000) -> list[Event]:
        """Return up to `limit` events after number `since`."""
        with self._lock:
            rows = self._connection.execute(
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
        with self._lock:
            (seq,) = self._connection.execute("SELECT coalesce(max(seq), 0) FROM event").fetchone()
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
            return cursor.rowcount


class JournalUnusable(Exception):
    """The journal cannot be opened; the agent does not start without it."""


def digest_of(request: JobRequest) -> str:
    """Return what decides whether two requests have the same body.

    The key and the request id are the envelope, not the body: a client that
    tries again with a new request id means the same job.
    """
    body = request.model_dump(mode="json", exclude={"idempotency_key", "request_id"})
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _same_job(key: str, row: tuple[str, str, str], body_digest: str) -> JobReport:
    job_id, known_digest, report = row
    if known_digest != body_digest:
        raise IdempotencyConflict(
            f"the idempotency key {key!r} belongs to job {job_id}, which asked for something else",
            "send the same body again, or take a new key for a new job",
        )
    return JobReport.model_validate_json(report)


def _job(row: tuple[str, str]) -> Job:
    request, report = row
    return Job(
        request=JobRequest.model_validate_json(request),
        report=JobReport.model_validate_json(report),
    )
