"""Log lines: their form, their fields, and what is never in them."""

import io
import logging
from collections.abc import Iterator

import pytest

from agent import logs


@pytest.fixture
def log() -> Iterator[logging.Logger]:
    logger = logging.getLogger("test_logs")
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield logger
    logger.handlers.clear()


@pytest.fixture
def console(log: logging.Logger) -> io.StringIO:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logs.ConsoleFormatter())
    log.addHandler(handler)
    return stream


@pytest.fixture
def journal(log: logging.Logger) -> list[tuple[str, dict[str, str]]]:
    entries: list[tuple[str, dict[str, str]]] = []

    def send(message: str, **fields: str) -> None:
        entries.append((message, fields))

    log.addHandler(logs.JournalHandler(send))
    return entries


def test_console_line_shows_context_sentence_and_fields(
    log: logging.Logger, console: io.StringIO
) -> None:
    with logs.bind(request_id="req-1", instance_uuid="u-1", job_id="j-1", image_id=None):
        fields = {"PHASE": "image_downloading", "BYTES": 7}
        log.info("fetched %s", "it", extra={"fields": fields})
    line = console.getvalue()
    assert "INFO [req-1] [instance: u-1] fetched it JOB_ID=j-1 PHASE=image_downloading" in line
    assert line.endswith("BYTES=7\n")


def test_context_ends_where_it_was_bound_to_end(log: logging.Logger, console: io.StringIO) -> None:
    with logs.bind(request_id="req-1"):
        with logs.bind(job_id="j-1"):
            pass
        log.info("outer")
    log.info("none")
    outer, none = console.getvalue().splitlines()
    assert "[req-1] outer" in outer
    assert "JOB_ID" not in outer
    assert "req-1" not in none


def test_journal_entry_has_each_field_of_its_own(
    log: logging.Logger, journal: list[tuple[str, dict[str, str]]]
) -> None:
    with logs.bind(request_id="req-1", job_id="j-1"):
        log.warning("retrying", extra={"fields": {"ELAPSED_MS": 12, "OUTCOME": "retry"}})
    ((message, fields),) = journal
    assert message == "retrying"
    assert fields["PRIORITY"] == "4"
    assert fields["REQUEST_ID"] == "req-1"
    assert fields["JOB_ID"] == "j-1"
    assert fields["ELAPSED_MS"] == "12"
    assert fields["OUTCOME"] == "retry"
    assert fields["SYSLOG_IDENTIFIER"] == "bootwright"


def test_what_strangers_write_does_nothing_to_a_terminal(
    log: logging.Logger, console: io.StringIO
) -> None:
    log.warning("image %s", "a\x1b[2J\x9b\u202eb", extra={"fields": {"NAME": "\x07c"}})
    assert console.getvalue().endswith(r"image a\x1b[2J\x9b\u202eb NAME=\x07c" + "\n")


def test_tracebacks_are_kept(log: logging.Logger, console: io.StringIO) -> None:
    try:
        raise ValueError("deep down")
    except ValueError:
        log.exception("failed")
    assert "Traceback" in console.getvalue()
    assert "deep down" in console.getvalue()


@pytest.mark.parametrize(
    "line",
    [
        "X-Auth-Token: s3cr3t",
        "curl -g -H 'X-Auth-Token: s3cr3t' http://glance/v2",
        "{'X-Auth-Token': 's3cr3t', 'Accept': '*/*'}",
        "{b'X-Subject-Token': b's3cr3t'}",
        "Authorization: Bearer s3cr3t",
        '{"auth": {"password": "s3cr3t", "user": "u"}}',
        "password=s3cr3t",
        "application_credential_secret = s3cr3t",
        "http://user:s3cr3t@proxy:3128/",
        "https://u:p@s3cr3t@h",
        '{"password": "correct horse s3cr3t"}',
        "{'adminPass_password': 'it is\\' s3cr3t'}",
        r'{"body": "{\"password\": \"correct horse s3cr3t\"}"}',
        "auth_token=s3cr3t",
        "secret_access_key=s3cr3t",
        '{"token": {"id": "s3cr3t"}}',
        '{"access": {"token": {"expires": "x", "tenant": {"name": "n"}, "id": "s3cr3t"}}}',
        '{"Authorization": "Basic s3cr3t"}',
    ],
)
def test_secrets_never_reach_the_log(
    log: logging.Logger,
    console: io.StringIO,
    journal: list[tuple[str, dict[str, str]]],
    line: str,
) -> None:
    log.info("%s", line)
    assert "s3cr3t" not in console.getvalue()
    assert "s3cr3t" not in str(journal)
    assert "***" in console.getvalue()


def test_what_follows_a_secret_stays(log: logging.Logger, console: io.StringIO) -> None:
    log.info("%s", '{"password": "correct horse", "user": "u"} password=p, token=t port=7')
    assert console.getvalue().endswith(
        '{"password": ***, "user": "u"} password=***, token=*** port=7\n'
    )


def test_secrets_in_fields_never_reach_the_journal(
    log: logging.Logger, journal: list[tuple[str, dict[str, str]]]
) -> None:
    log.info("fetched", extra={"fields": {"URL": "http://u:s3cr3t@h/"}})
    ((_, fields),) = journal
    assert fields["URL"] == "http://u:***@h/"


def test_hashed_tokens_and_plain_words_stay(log: logging.Logger, console: io.StringIO) -> None:
    log.info("X-Auth-Token: {SHA256}abc; the password is wrong; http://host:80/a@b")
    assert "{SHA256}abc; the password is wrong; http://host:80/a@b" in console.getvalue()


def test_libraries_are_quiet_unless_debug() -> None:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        logs.setup(debug=False)
        assert not logging.getLogger("keystoneauth.session").isEnabledFor(logging.INFO)
        assert logging.getLogger("agent").isEnabledFor(logging.INFO)
        logs.setup(debug=True)
        assert logging.getLogger("urllib3").isEnabledFor(logging.DEBUG)
    finally:
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
