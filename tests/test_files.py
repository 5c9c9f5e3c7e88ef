"""Durable file work, on real files."""

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import files
from agent.cancellation import Cancellation
from agent.errors import BackendError, BootwrightError, Cancelled, InsufficientFreeSpace
from tests.small_file_system import mounted_file_system

MIB = 1 << 20

pieces = st.lists(
    st.tuples(
        st.sampled_from((b"\x00", b"\x01")),
        st.sampled_from((1, 511, 4095, 4096, 4097, 10_000, 65_536)),
    ),
    max_size=8,
)


small_file_system = mounted_file_system("tmpfs")


def leftovers(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.endswith(".tmp")]


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_write_durably_replaces_the_whole_file_with_the_mode_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "manifest"
    target.write_bytes(b"a much longer old content")
    files.write_durably(target, b"new", mode=0o600)
    assert target.read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert leftovers(tmp_path) == []


def test_files_get_their_names_in_turn_when_all_are_written(tmp_path: Path) -> None:
    directory = tmp_path / "new"
    seen: list[list[str]] = []

    def look() -> None:
        seen.append(sorted(path.name for path in directory.glob("[!.]*")))

    with files.Together() as together:
        together.directory(directory, mode=0o711)
        for name in ("record", "disk"):
            with together.file(
                directory / name, needed=1, what="writing", mode=0o600, named=look
            ) as fd:
                os.write(fd, name.encode())
            look()
        together.publish()

    assert seen == [[], [], ["record"], ["disk", "record"]]
    assert [(directory / name).read_bytes() for name in ("record", "disk")] == [b"record", b"disk"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o711
    assert stat.S_IMODE((directory / "disk").stat().st_mode) == 0o600
    assert leftovers(directory) == []


def test_files_of_which_one_fails_are_none(tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"old")

    def fail_at_the_second() -> None:
        with files.Together() as together:
            together.directory(tmp_path / "new", mode=0o711)
            with together.file(old, needed=1, what="writing") as fd:
                os.write(fd, b"new")
            with together.file(tmp_path / "new/disk", needed=1, what="writing") as fd:
                raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_at_the_second()
    assert old.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_files_that_cannot_be_made_durable_get_no_names(tmp_path: Path) -> None:
    def fail_to_flush() -> None:
        with files.Together() as together:
            with together.file(tmp_path / "first", needed=1, what="writing"):
                pass
            with together.file(tmp_path / "second", needed=1, what="writing") as fd:
                # What cannot be flushed: a pipe in the file's place. It takes no advice either,
                # which is no failure yet.
                reader, writer = os.pipe()
                os.dup2(writer, fd)
                os.close(reader)
                os.close(writer)
            together.publish()

    with pytest.raises(OSError, match="Invalid argument"):
        fail_to_flush()
    assert list(tmp_path.iterdir()) == []


def test_what_is_published_stays_whatever_comes_after(tmp_path: Path) -> None:
    def fail_later() -> None:
        with files.Together() as together:
            together.directory(tmp_path / "new", mode=0o711)
            with together.file(tmp_path / "new/record", needed=1, what="writing"):
                pass
            together.publish()
            with together.file(tmp_path / "new/disk", needed=1, what="writing"):
                pass
            raise RuntimeError("later")

    with pytest.raises(RuntimeError, match="later"):
        fail_later()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["record"]


def test_who_waits_for_a_name_hears_of_it_though_the_file_cannot_be_closed(tmp_path: Path) -> None:
    told: list[str] = []
    descriptors: list[int] = []
    with files.Together() as together:
        with together.file(
            tmp_path / "first", needed=1, what="writing", named=lambda: os.close(descriptors[0])
        ):
            pass
        with together.file(
            tmp_path / "second", needed=1, what="writing", named=lambda: told.append("second")
        ) as fd:
            descriptors.append(fd)
        together.publish()
    assert told == ["second"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_what_cannot_be_removed_hides_neither_the_reason_nor_the_rest(tmp_path: Path) -> None:
    def fail_to_remove() -> None:
        with files.Together() as together:
            for name in ("first", "second"):
                with together.file(tmp_path / name, needed=1, what="writing"):
                    pass
            [stubborn] = tmp_path.glob(".first.*")
            stubborn.unlink()
            stubborn.mkdir()
            raise RuntimeError("the reason")

    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RuntimeError, match="the reason"):
        fail_to_remove()
    assert [path.is_dir() for path in tmp_path.iterdir()] == [True]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_writer_s_error_is_told_though_its_file_cannot_be_removed(tmp_path: Path) -> None:
    def fail_midway() -> None:
        with files.replacing(tmp_path / "manifest", needed=3, what="writing"):
            [stubborn] = tmp_path.iterdir()
            stubborn.unlink()
            stubborn.mkdir()
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "manifest"
    target.write_bytes(b"old")

    def fail_midway() -> None:
        with files.replacing(target, needed=3, what="writing") as fd:
            os.write(fd, b"new")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail_midway()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest"]


def test_the_errors_of_a_full_disk_name_path_bytes_and_a_way_out(tmp_path: Path) -> None:
    target = tmp_path / "disk"
    for code in (errno.ENOSPC, errno.EDQUOT):
        with (
            pytest.raises(InsufficientFreeSpace) as caught,
            files.replacing(target, needed=12345, what="writing"),
        ):
            raise OSError(code, os.strerror(code))
        assert str(target) in caught.value.message
        assert "12345 bytes are needed" in caught.value.message
        assert "cache gc" in caught.value.hint
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, InsufficientFreeSpace),
        (errno.EDQUOT, InsufficientFreeSpace),
        (errno.EIO, BackendError),
    ],
)
def test_what_the_file_system_says_is_an_error_of_the_job(
    tmp_path: Path, code: int, kind: type[BootwrightError]
) -> None:
    with (
        pytest.raises(kind, match=f"growing {tmp_path / 'disk'}") as caught,
        files.reporting("growing", tmp_path / "disk"),
    ):
        raise OSError(code, os.strerror(code))
    assert type(caught.value) is kind
    assert caught.value.hint


def test_an_error_without_a_number_is_told_in_its_own_words(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match=f"fetching into {tmp_path}: the peer has gone"),
        files.reporting("fetching into", tmp_path),
    ):
        raise ConnectionError("the peer has gone")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="Input/output"),
        files.replacing(tmp_path / "disk", needed=1, what="writing"),
    ):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_copy_that_cannot_fit_is_refused_before_the_first_byte(
    tmp_path: Path, small_file_system: Path
) -> None:
    source = tmp_path / "base"
    source.write_bytes(os.urandom(3 * MIB))
    with pytest.raises(InsufficientFreeSpace, match=f"{3 * MIB} bytes are needed"):
        files.copy_sparse(source, small_file_system / "disk", cancellation=Cancellation())
    assert list(small_file_system.iterdir()) == []


@given(pieces, st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_copy_is_equal_and_no_larger_on_disk(
    tmp_path: Path, pieces: list[tuple[bytes, int]], share: bool
) -> None:
    source, target = tmp_path / "base", tmp_path / "disk"
    with source.open("wb") as f:
        for byte, count in pieces:
            if byte == b"\x00":
                f.seek(count, os.SEEK_CUR)
            else:
                f.write(byte * count)
        f.truncate()
    files.copy_sparse(source, target, share=share, cancellation=Cancellation())
    assert target.read_bytes() == source.read_bytes()
    assert allocated(target) <= allocated(source)
    assert leftovers(tmp_path) == []


def test_a_copy_across_file_systems_is_equal(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system")
    source = elsewhere / f"bootwright-test-{os.getpid()}"
    try:
        with source.open("wb") as f:
            f.write(os.urandom(5 * MIB))
            f.seek(20 * MIB)
            f.write(b"end")
        files.copy_sparse(source, tmp_path / "disk", cancellation=Cancellation())
        assert (tmp_path / "disk").read_bytes() == source.read_bytes()
        assert allocated(tmp_path / "disk") < 6 * MIB
    finally:
        source.unlink()


def test_a_cancelled_copy_leaves_nothing(tmp_path: Path) -> None:
    source = tmp_path / "base"
    source.write_bytes(b"x" * MIB)
    cancellation = Cancellation()
    cancellation.cancel(Cancelled("enough"))
    with pytest.raises(Cancelled):
        files.copy_sparse(source, tmp_path / "disk", cancellation=cancellation)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_remove_tree_removes_links_and_not_what_they_point_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "below" / "link").symlink_to(outside)
    files.remove_tree(tree)
    assert not tree.exists()
    assert (outside / "file").read_bytes() == b"x"
    files.remove_tree(tree)  # once more is no error


def test_remove_tree_refuses_a_link_and_a_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(outside)
    for path in (tmp_path / "link", outside / "file"):
        with pytest.raises(BackendError, match="not a directory"):
            files.remove_tree(path)
    assert (outside / "file").exists()
