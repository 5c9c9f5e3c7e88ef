"""The hash whose state can be written down, judged by hashlib."""

import hashlib
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import resumable_hash
from agent.resumable_hash import Sha512

pytestmark = pytest.mark.skipif(not resumable_hash.available(), reason="needs libcrypto.so.3")

pieces = st.lists(
    st.one_of(
        st.binary(max_size=300),
        # Whole blocks, and one byte beside them, are where padding goes wrong.
        st.sampled_from((0, 1, 111, 112, 127, 128, 129, 255, 256, 4096)).map(lambda n: b"\xa5" * n),
    ),
    max_size=8,
)


@given(pieces)
def test_equals_hashlib_however_the_bytes_are_cut(chunks: list[bytes]) -> None:
    sha = Sha512()
    for chunk in chunks:
        sha.update(chunk)
    assert sha.hexdigest() == hashlib.sha512(b"".join(chunks)).hexdigest()


@given(pieces)
def test_a_state_goes_on_as_if_nothing_had_happened(chunks: list[bytes]) -> None:
    sha = Sha512()
    so_far = b""
    for chunk in chunks:
        sha.update(chunk)
        so_far += chunk
        state = sha.state()
        assert sha.state() == state
        sha = Sha512.from_state(state)
        assert sha.hexdigest() == hashlib.sha512(so_far).hexdigest()


def test_a_state_says_nothing_of_blocks_that_are_done() -> None:
    sha = Sha512()
    sha.update(b"secret" * 20)
    sha.update(b"x" * 9)
    assert b"secret" not in sha.state()


def test_a_state_goes_on_in_another_process() -> None:
    sha = Sha512()
    sha.update(b"a" * 1_000_001)
    program = (
        "import sys; from agent.resumable_hash import Sha512;"
        "sha = Sha512.from_state(bytes.fromhex(sys.argv[1]));"
        "sha.update(b'b' * 77); print(sha.hexdigest())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, sha.state().hex()], capture_output=True, check=True
    )
    expected = hashlib.sha512(b"a" * 1_000_001 + b"b" * 77).hexdigest()
    assert done.stdout.decode().strip() == expected


@given(st.integers(0, 225), st.integers(1, 255))
def test_a_damaged_state_is_refused(position: int, flip: int) -> None:
    sha = Sha512()
    sha.update(b"x" * 333)
    state = bytearray(sha.state())
    state[position] ^= flip
    with pytest.raises(ValueError, match="SHA-512 state"):
        Sha512.from_state(bytes(state))


def test_a_state_that_is_cut_short_or_too_long_is_refused() -> None:
    state = Sha512().state()
    for wrong in (b"", state[:-1], state + b"x"):
        with pytest.raises(ValueError, match="damaged"):
            Sha512.from_state(wrong)


def test_two_threads_hash_beside_each_other() -> None:
    data = b"y" * (1 << 20)
    digests: list[str] = []

    def run() -> None:
        sha = Sha512()
        for _ in range(8):
            sha.update(data)
        digests.append(sha.hexdigest())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [hashlib.sha512(data * 8).hexdigest()] * 2
