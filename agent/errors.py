"""What can go wrong with a job, and what the person who sent it can do about it.

The name of a class is the error's `code` in every result, log line and API
answer, so a name, once released, never changes.

    BootwrightError
    ├── InvalidJob                    the request itself is wrong
    ├── NotFound                      no such job, instance or image here
    ├── IdempotencyConflict           same key, other body
    ├── ImageError                    (never raised itself)
    │   ├── ImageNotFound
    │   ├── ImageNotActive
    │   ├── ImageNotAuthorized
    │   ├── ImageUnacceptable         hostile, unsupported, or not what it claims to be
    │   ├── ImageCorrupt              the hash or the length is wrong
    │   ├── ImageSourceUnavailable    retriable
    │   ├── FlavorDiskSmallerThanImage
    │   └── FlavorDiskSmallerThanMinDisk
    ├── InsufficientFreeSpace         retriable
    ├── BackendError
    ├── HypervisorError               retriable
    ├── InstanceExists
    ├── DeadlineExceeded              retriable
    ├── Cancelled
    ├── AgentStopping                 retriable; the job goes on after the restart
    └── InternalError                 a defect of ours
"""

import re
from typing import ClassVar, Final, Self

_UNPRINTABLE: Final = re.compile(
    # Controls; what turns the direction of a line around; halves of characters.
    r"[^\t\n -~\u00a0-\U0010ffff]|[\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Return `text` with escapes in place of what could make a terminal do something.

    Names in images, and what programs say of them, are written by strangers.
    """
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class BootwrightError(Exception):
    """An error with a sentence for people and a code for programs.

    `message` says what was attempted, on what, and which rule, byte or number
    was in the way. `hint` says what to do about it and may be empty.
    """

    retriable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = printable(message), printable(hint)
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    @property
    def code(self) -> str:
        return type(self).__name__

    def and_also(self, fact: str) -> Self:
        """Return the same error, whose message tells that too."""
        return type(self)(f"{self.message}; {fact}", self.hint)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidJob(BootwrightError):
    """The job, or a field of it, breaks the schema or contradicts itself."""


class NotFound(BootwrightError):
    """What was asked for by name or id does not exist on this host."""


class IdempotencyConflict(BootwrightError):
    """The idempotency key is taken by a job with another body."""


class ImageError(BootwrightError):
    """Something about the image itself; only the subclasses are raised."""


class ImageNotFound(ImageError):
    """The image source has no image of that id, or hides it from us."""


class ImageNotActive(ImageError):
    """The image exists but its bytes may not be read now (queued, deactivated …)."""


class ImageNotAuthorized(ImageError):
    """The image source refuses our credentials."""


class ImageUnacceptable(ImageError):
    """The image is hostile, of an unsupported kind, or not what it claims to be."""


class ImageCorrupt(ImageError):
    """The bytes received are not the bytes the image source promises."""


class ImageSourceUnavailable(ImageError):
    """The image source did not answer, or kept failing, until we gave up."""

    retriable = True

    def __init__(self, message: str, hint: str = "", *, retry_after_s: float | None = None) -> None:
        """`retry_after_s`: how long the image source itself asks us to stay away."""
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class FlavorDiskSmallerThanImage(ImageError):
    """The image's virtual size does not fit on the flavor's disk."""


class FlavorDiskSmallerThanMinDisk(ImageError):
    """The image asks for a larger disk (`min_disk`) than the flavor has."""


class InsufficientFreeSpace(BootwrightError):
    """A file system is too full for what would be written."""

    retriable = True


class BackendError(BootwrightError):
    """A disk could not be made, grown or removed."""


class HypervisorError(BootwrightError):
    """libvirt is away or refused."""

    retriable = True


class InstanceExists(BootwrightError):
    """The instance's name or uuid is in use on this host."""


class DeadlineExceeded(BootwrightError):
    """The job's `deadline_s` ran out."""

    retriable = True


class Cancelled(BootwrightError):
    """Somebody asked for the job to end."""


class AgentStopping(BootwrightError):
    """The agent is draining; the job goes on when it is back."""

    retriable = True


class InternalError(BootwrightError):
    """A defect in Bootwright; the log holds the traceback."""
