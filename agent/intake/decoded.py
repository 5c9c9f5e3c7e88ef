"""Makes the raw disk of a qcow2 image while its bytes arrive.

    raw                what has been decoded
    spill              what the decoder has to look at again
    head               the image's first bytes, for the inspection
    checkpoint.json    offset, state of the hash, state of the decoder
    tail-<offset>      see `agent.intake.tails`

A checkpoint is made every 16 MiB and survives a crash of the host; with the
tails a crash of the agent costs nothing at all. A checkpoint is as good as the
hash of the whole: if that does not match, the image is fetched from its start.
Of a hash whose state cannot be written down, and of several, there are no
checkpoints, so that the tails hold the whole image.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from pydantic import TypeAdapter, ValidationError

from agent import resumable_hash
from agent.cancellation import Cancellation
from agent.errors import BootwrightError
from agent.files import first_bytes, reporting_no_space, write_durably
from agent.image import Image
from agent.inspection import HEAD, Inspection, Verdict, refuse_nested
from agent.intake import Undecodable
from agent.intake.hasher import Hash, Hashers
from agent.intake.marker import Marker
from agent.intake.tails import Tails
from agent.partial import Partial
from agent.qcow2_decoder import Decoder
from agent.resumable_hash import Sha512


@dataclass(frozen=True, kw_only=True, slots=True)
class _Checkpoint:
    version: int = 1
    offset: int
    hash_state: str
    """Hexadecimal."""
    decoder_state: str


_CHECKPOINT = TypeAdapter(_Checkpoint)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """A checkpoint that is not on stable storage yet."""

    offset: int
    hash_state: "Future[bytes]"
    decoder_state: bytes


# The algorithm of `agent.resumable_hash`.
_RESUMABLE: Final = "sha512"


def possible(image: Image) -> bool:
    """Return whether an image can be decoded as it arrives, as far as its record tells."""
    return image.disk_format == "qcow2" and image.size is not None


def _new_hashes(algorithms: Sequence[str]) -> dict[str, Hash]:
    if tuple(algorithms) == (_RESUMABLE,) and resumable_hash.available():
        return {_RESUMABLE: Sha512()}
    return {algorithm: hashlib.new(algorithm) for algorithm in algorithms}


def begun(partial: Partial) -> bool:
    """Return whether `partial` was being decoded."""
    return _head(partial).exists()


def covered(partial: Partial, algorithms: Sequence[str]) -> bool:
    """Return whether what was begun can be gone on with in all these hashes."""
    return tuple(algorithms) == (_RESUMABLE,) or not _checkpoint(partial).exists()


class DecodedIntake:
    """See `Intake`. Made by `begin` or `resume`."""

    def __init__(self, partial: Partial, decoder: Decoder, hashes: Mapping[str, Hash]) -> None:
        self.kept = 0
        self._partial = partial
        self._decoder = decoder
        resumable = hashes.get(_RESUMABLE)
        self._resumable = resumable if isinstance(resumable, Sha512) else None
        self._hashers = Hashers(hashes)
        self._tails = Tails(partial.directory)
        # Opened before anything is written: a descriptor that is opened after a
        # write was lost does not hear of it.
        self._synced = [
            os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (partial.raw, _spill(partial))
        ]
        self._worth_marking = False
        self._marker: Marker[_Mark] = Marker(self._settle, decoder.offset)

    @classmethod
    def begin(cls, partial: Partial, *, algorithms: Sequence[str], head: bytes) -> Self:
        """Begin an image whose first bytes are `head`; they are still to be taken.

        Raises:
            agent.qcow2_decoder.Unsupported: another way has to be found.
            Undecodable: its header breaks a rule.
        """
        decoder = _begin(partial, head)
        write_durably(_head(partial), head)
        return cls(partial, decoder, _new_hashes(algorithms))

    @classmethod
    def resume(
        cls,
        partial: Partial,
        inspection: Inspection,
        *,
        algorithms: Sequence[str],
        cancellation: Cancellation,
    ) -> Self:
        """Go on where the last run was interrupted; `inspection` is shown what counts.

        The algorithms have to be `covered`.

        Raises:
            Undecodable: what is there is damaged.
        """
        checkpoint = _read_checkpoint(partial)
        head = _head(partial).read_bytes()
        hashes: Mapping[str, Hash]
        if checkpoint is None:
            decoder, hashes = _begin(partial, head), _new_hashes(algorithms)
        else:
            try:
                hashes = {_RESUMABLE: Sha512.from_state(bytes.fromhex(checkpoint.hash_state))}
                state = checkpoint.decoder_state.encode()
                decoder = Decoder.resume(state, partial.raw, _spill(partial))
            except (ValueError, FileNotFoundError) as e:
                raise Undecodable(f"the checkpoint cannot be used: {e}") from e
            inspection.feed(head)
            inspection.pass_over(decoder.offset - len(head))
        intake = cls(partial, decoder, hashes)
        try:
            intake._replay(inspection, cancellation)
        except BaseException:
            intake.close()
            raise
        return intake

    def _replay(self, inspection: Inspection, cancellation: Cancellation) -> None:
        if not self._partial.same_boot:
            self._tails.forget()
        self._partial.mark(self.offset)
        for piece in self._tails.pieces(self.offset):
            cancellation.check()
            inspection.feed(piece)
            self._pass(piece)
        self.kept = self.offset

    @property
    def offset(self) -> int:
        return self._decoder.offset

    def take(self, chunk: bytes) -> None:
        self._worth_marking = False
        begin = self.offset
        self._pass(chunk)
        with reporting_no_space(self._partial.raw, len(chunk), "writing beside"):
            self._tails.append(begin, chunk)
        if self._resumable is not None:
            state = self._resumable.state
            self._marker.reached(self.offset, lambda: self._mark(state))
        self._worth_marking = True

    def _pass(self, chunk: bytes) -> None:
        self._hashers.update(chunk)
        with reporting_no_space(self._partial.raw, len(chunk), "decoding into"):
            try:
                self._decoder.feed(chunk)
            except ValueError as e:
                raise Undecodable(str(e)) from e

    def _mark(self, hash_state: Callable[[], bytes]) -> _Mark:
        try:
            state = self._decoder.state()
        except ValueError as e:
            raise Undecodable(str(e)) from e
        mark = _Mark(
            offset=self.offset,
            hash_state=self._hashers.after(_RESUMABLE, hash_state),
            decoder_state=state,
        )
        self._tails.cut()
        return mark

    def _settle(self, mark: _Mark) -> None:
        """Make a mark a checkpoint; in the marker's thread."""
        for fd in self._synced:
            os.fdatasync(fd)
        checkpoint = _Checkpoint(
            offset=mark.offset,
            hash_state=mark.hash_state.result().hex(),
            decoder_state=mark.decoder_state.decode(),
        )
        write_durably(_checkpoint(self._partial), _CHECKPOINT.dump_json(checkpoint))
        self._tails.forget(mark.offset)

    def digests(self) -> Mapping[str, str]:
        self._worth_marking = False
        self._marker.close()
        self._marker.check()
        try:
            self._decoder.finish()
        except ValueError as e:
            raise Undecodable(str(e)) from e
        return self._hashers.hexdigests()

    def disk(self, verdict: Verdict) -> Path:
        if self._decoder.virtual_size != verdict.virtual_size:
            raise AssertionError("inspection and decoder read the same header")
        refuse_nested(self._partial.image.id, first_bytes(self._partial.raw, HEAD))
        return self._partial.raw

    def close(self) -> None:
        self._marker.close()
        if self._worth_marking and self._resumable is not None:
            self._worth_marking = False
            # Whoever stops the agent may be about to reboot the host.
            with contextlib.suppress(OSError, BootwrightError, Undecodable):
                self._marker.check()
                self._settle(self._mark(self._resumable.state))
        self._hashers.close()
        self._decoder.close()
        self._tails.cut()
        while self._synced:
            os.close(self._synced.pop())


def _begin(partial: Partial, head: bytes) -> Decoder:
    if partial.image.size is None:
        raise AssertionError("`possible` has been asked")
    try:
        return Decoder.begin(head, partial.raw, _spill(partial), size=partial.image.size)
    except ValueError as e:
        raise Undecodable(str(e)) from e


def _read_checkpoint(partial: Partial) -> _Checkpoint | None:
    try:
        return _CHECKPOINT.validate_json(_checkpoint(partial).read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _checkpoint(partial: Partial) -> Path:
    return partial.directory / "checkpoint.json"


def _head(partial: Partial) -> Path:
    return partial.directory / "head"


def _spill(partial: Partial) -> Path:
    return partial.directory / "spill"
