"""What goes wrong between us and Glance, as the errors of `agent.errors`.

Final is only what cannot change by itself: a missing image, a refusal. The
rest may be different next time, and more often than not it is a proxy that
speaks and not Glance, so it is all `ImageSourceUnavailable`.

The texts of foreign errors are left out: they hold URLs, and those may hold
secrets. What stays is the cause at the bottom of the chain.
"""

import contextlib
import email.utils
import http
import http.client
import re
import ssl
import time

import glanceclient.exc
import keystoneauth1.exceptions
import requests
import urllib3.exceptions

from agent.errors import (
    BootwrightError,
    ImageNotAuthorized,
    ImageNotFound,
    ImageSourceUnavailable,
)

# An answer that is not Glance's ends up as one of these, out of glanceclient
# or the schema of the record: KeyError for an error without a Content-Type,
# AttributeError for a login page, UnicodeDecodeError (a ValueError) for one in
# Latin-1.
_UNREADABLE = (LookupError, TypeError, AttributeError, ValueError)

FOREIGN = (
    glanceclient.exc.BaseException,
    glanceclient.exc.ClientException,
    keystoneauth1.exceptions.ClientException,
    requests.RequestException,
    urllib3.exceptions.HTTPError,
    http.client.HTTPException,
    OSError,
    *_UNREADABLE,
)
"""Everything that asking Glance through glanceclient and keystoneauth was seen to raise."""


class Declined(ImageSourceUnavailable):
    """The request is not taken: as it is, or as things are."""

    @property
    def code(self) -> str:
        return ImageSourceUnavailable.__name__


def refusal(response: requests.Response, what: str) -> BootwrightError:
    """Return the error for an answer that is no success."""
    request_id = response.headers.get("X-Openstack-Request-Id", "")
    if re.fullmatch(r"req-[\w.-]{1,100}", request_id):
        what = f"{what} ({request_id} in Glance's log)"
    retry_after_s = _retry_after_s(response.headers.get("Retry-After", ""))
    return _status_error(response.status_code, what, retry_after_s)


def clock(response: requests.Response) -> float | None:
    """Return when an answer was made, by the clock of who made it; None if it does not say."""
    try:
        return email.utils.parsedate_to_datetime(response.headers["Date"]).timestamp()
    except (KeyError, ValueError, OverflowError):
        return None


def translated(error: Exception, what: str) -> BootwrightError:
    """Return our error for one of `FOREIGN`; `what` was asked for, and of whom."""
    match error:
        case glanceclient.exc.HTTPException() if isinstance(error.code, int):
            return _status_error(error.code, what)
        case keystoneauth1.exceptions.Unauthorized() | keystoneauth1.exceptions.Forbidden():
            return ImageNotAuthorized(
                f"{what}: Keystone refuses the credentials ({error.http_status})",
                "check user, password or application credential, project and domains in [glance]",
            )
        case keystoneauth1.exceptions.AuthPluginException():
            return ImageNotAuthorized(
                f"{what}: the credentials are incomplete ({type(error).__name__})",
                "check auth_type and what it needs in [glance]",
            )
        case keystoneauth1.exceptions.HttpError():
            return ImageSourceUnavailable(
                f"{what}: Keystone answered {error.http_status}",
                "see Keystone's log; check auth_url in [glance]",
            )
        case _:
            return _unavailable(error, what)


def _unavailable(error: Exception, what: str) -> ImageSourceUnavailable:
    # OSError's family and requests' own have ValueErrors among them.
    unreadable = isinstance(error, _UNREADABLE) and not isinstance(error, OSError)
    if unreadable or isinstance(error, requests.exceptions.JSONDecodeError):
        return ImageSourceUnavailable(
            f"{what}: the answer is not one of Glance's image API ({type(error).__name__})",
            "a proxy or a login page answers in Glance's place: check endpoint_override",
        )
    return ImageSourceUnavailable(
        f"{what}: {_cause(error)}",
        "check that Glance and Keystone run, and that this host reaches them",
    )


def _status_error(status: int, what: str, retry_after_s: float | None = None) -> BootwrightError:
    answer = f"{what}: {status}"
    with contextlib.suppress(ValueError):
        answer = f"{answer} {http.HTTPStatus(status).phrase}"
    match status:
        case 401:
            return ImageNotAuthorized(
                answer,
                "Glance does not accept our token, not even a new one: check the credentials in "
                "[glance], and that Glance uses the same Keystone",
            )
        case 403:
            return ImageNotAuthorized(
                answer,
                "most likely the image is deactivated ('openstack image show' tells); else the "
                "agent's user lacks the role to read image data (member has it, reader has not)",
            )
        case 404 | 410:
            return ImageNotFound(
                answer,
                "it never existed, is deleted, or is private to another project: check the id, "
                "the project in [glance] and the image's visibility",
            )
        case 400 | 409:
            return Declined(answer, "Glance or a proxy before it says no: see their logs")
        case 413 | 429:
            hint = "Glance or a proxy before it limits requests: build fewer at a time"
        case _:
            hint = "Glance or a proxy before it is in trouble: see their logs"
    return ImageSourceUnavailable(answer, hint, retry_after_s=retry_after_s)


def _retry_after_s(value: str) -> float | None:
    """Seconds from now; the header has a number of them or a date (RFC 9110, 10.2.3)."""
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _cause(error: BaseException) -> str:
    """What is at the bottom of a chain of wrapped errors, in a few words without addresses."""
    seen = {id(error)}
    while (inner := error.__cause__ or error.__context__) and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    match error:
        case ssl.SSLCertVerificationError():
            text = f"its certificate is not trusted: {error.verify_message}"
        case ssl.SSLError():
            text = f"TLS failed: {error.reason}"
        case TimeoutError():
            text = "no answer in time"
        case http.client.RemoteDisconnected():
            text = "the connection was closed before an answer came"
        case http.client.IncompleteRead() | urllib3.exceptions.IncompleteRead():
            text = "the connection was closed before the answer's end"
        case OSError() if error.strerror:
            text = error.strerror
        case _:
            text = type(error).__name__
    return text
