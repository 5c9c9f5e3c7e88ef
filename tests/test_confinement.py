"""What a confined program cannot do, tried with real programs as one and the same user."""

import ast
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import confinement, process
from agent.cancellation import Cancellation
from agent.confinement import Confinement
from agent.errors import BackendError, ImageUnacceptable
from agent.process import ProgramFailed
from agent.qemu_img import QemuImg
from tests.qemu_images import needs_qemu_img

MIB = 1 << 20
NOTHING = Confinement()

pytestmark = pytest.mark.skipif(
    confinement.landlock_abi() == 0 and not os.environ.get("CI"),
    reason="the kernel has no Landlock",
)


def shell(script: str, confinement: Confinement) -> str:
    """Run a script, confined; what it writes to standard output."""
    done = process.run(["/bin/sh", "-c", script], timeout_s=20, confinement=confinement)
    return done.stdout.decode()


def python(script: str, *arguments: object) -> process.Completed:
    return process.run(
        ["/usr/bin/python3", "-I", "-S", "-c", script, *map(str, arguments)],
        timeout_s=20,
        confinement=NOTHING,
    )


def test_only_what_was_given_can_be_read(tmp_path: Path) -> None:
    given, other = tmp_path / "given", tmp_path / "other"
    given.write_text("given\n")
    other.write_text("secret\n")
    allowed = Confinement(readable=(given,))

    assert shell(f"cat {given}", allowed) == "given\n"
    for path in (other, "/etc/passwd", f"/proc/{os.getpid()}/environ"):
        with pytest.raises(ProgramFailed, match="Permission denied"):
            shell(f"cat {path}", allowed)
    with pytest.raises(ProgramFailed, match="Permission denied"):
        shell(f"ls {tmp_path}", allowed)


def test_a_link_in_a_directory_does_not_lead_out_of_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    (tmp_path / "file").write_text("given\n")
    allowed = Confinement(readable=(tmp_path,))
    assert shell(f"cat {tmp_path}/file", allowed) == "given\n"
    with pytest.raises(ProgramFailed, match="Permission denied"):
        shell(f"cat {tmp_path}/link", allowed)


def test_only_what_was_given_can_be_written(tmp_path: Path) -> None:
    target, source = tmp_path / "target", tmp_path / "source"
    target.write_text("old, and longer")
    source.write_text("source")
    allowed = Confinement(readable=(source,), writable=(target,))

    shell(f"echo new > {target}", allowed)

    assert target.read_text() == "new\n"
    for script in (
        f"echo x > {source}",
        f"echo x > {tmp_path}/another",
        f"rm {target}",
        f"mv {target} {tmp_path}/another",
        f"ln {source} {tmp_path}/another",
        f"mkdir {tmp_path}/another",
        "echo x > /usr/x",
    ):
        with pytest.raises(ProgramFailed, match="Permission denied"):
            shell(script, allowed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    assert source.read_text() == "source"


def test_there_is_no_network_and_no_way_to_a_daemon(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.fspath(tmp_path / "socket"))
        unix.listen()
        port = tcp.getsockname()[1]
        for family, kind, address in (
            ("AF_INET", "SOCK_STREAM", f"('127.0.0.1', {port})"),
            ("AF_INET", "SOCK_DGRAM", f"('127.0.0.1', {port})"),
            ("AF_UNIX", "SOCK_STREAM", repr(os.fspath(tmp_path / "socket"))),
        ):
            script = f"import socket as s; s.socket(s.{family}, s.{kind}).connect({address})"
            with pytest.raises(ProgramFailed, match="PermissionError"):
                python(script)
        # The same program can, when it is not confined.
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import socket; socket.create_connection(('127.0.0.1', {port}))",
            ],
            check=True,
        )


def test_there_is_no_way_round_by_io_uring() -> None:
    script = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(425, 1, ctypes.create_string_buffer(256)) == -1
print(ctypes.get_errno())
"""
    assert python(script).stdout == b"13\n"


def test_the_agent_cannot_be_signalled() -> None:
    if confinement.landlock_abi() < 6:
        pytest.skip("this kernel's Landlock does not know of signals")
    with pytest.raises(ProgramFailed, match=r"(?i)not permitted|EPERM"):
        shell(f"kill -0 {os.getpid()}", NOTHING)


def test_the_agent_itself_is_not_confined(tmp_path: Path) -> None:
    shell("true", NOTHING)
    (tmp_path / "file").write_text("x")
    assert Path("/etc/passwd").read_text()
    with socket.create_server(("127.0.0.1", 0)):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name == "confined"]


def test_a_program_that_cannot_be_confined_is_not_started(tmp_path: Path) -> None:
    missing = Confinement(readable=(tmp_path / "missing",))
    with pytest.raises(ProgramFailed, match=r"could not be started.*missing") as caught:
        shell("echo hello", missing)
    assert caught.value.cause is process.Cause.START


def qcow2(path: Path, *arguments: str | Path) -> None:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, *arguments], check=True)


@needs_qemu_img
@pytest.mark.parametrize("reference", ["backing file", "data file"])
def test_qemu_img_cannot_follow_a_reference(tmp_path: Path, reference: str) -> None:
    """Inspection refuses such an image; this is what happens if it ever should not."""
    secret, image, base = (tmp_path / name for name in ("secret", "image", "base"))
    secret.write_bytes(b"secret".ljust(MIB, b"\0"))
    if reference == "backing file":
        qcow2(image, "-b", secret, "-F", "raw")
    else:
        qcow2(image, "-o", f"data_file={secret}", "1M")

    with pytest.raises(ImageUnacceptable, match=r"secret.*Permission denied"):
        QemuImg().convert(image, "qcow2", base, Cancellation(), virtual_size=MIB)

    assert not base.exists()
    # It would have followed it without.
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, base], check=True)
    assert base.stat().st_size == MIB


@needs_qemu_img
def test_growing_an_overlay_reaches_its_base_and_nothing_else(tmp_path: Path) -> None:
    base, overlay = tmp_path / "base", tmp_path / "overlay"
    base.write_bytes(bytes(MIB))
    qcow2(overlay, "-b", base, "-F", "raw")
    with pytest.raises(BackendError, match=r"base.*Permission denied"):
        QemuImg().grow(overlay, "qcow2", 4 * MIB, backing=())
    QemuImg().grow(overlay, "qcow2", 4 * MIB, backing=(base,))
    looked = subprocess.run(
        ["qemu-img", "info", "--output=json", "-f", "qcow2", overlay],
        capture_output=True,
        check=True,
    )
    assert json.loads(looked.stdout)["virtual-size"] == 4 * MIB


def test_in_a_workplace_files_are_made_and_removed_and_nowhere_else(tmp_path: Path) -> None:
    workplace, other = tmp_path / "workplace", tmp_path / "other"
    workplace.mkdir()
    other.mkdir()
    allowed = Confinement(workplaces=(workplace,))
    shell(f"cd {workplace} && mkdir a && echo x > b && mv b c && echo y > d && rm d", allowed)
    assert sorted(path.name for path in workplace.iterdir()) == ["a", "c"]
    for script in (f"echo x > {other}/x", f"mv {workplace}/c {other}/c", f"ls {other}"):
        with pytest.raises(ProgramFailed, match=r"(?i)permission denied|cross-device"):
            shell(script, allowed)


# Programs that open nothing of an image or a disk.
HARMLESS = {
    ("ionice", "-c"): "our own thread",
    ("systemctl", "show"): "doctor",
    ("qemu-img", "--version"): "doctor",
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every place where the agent starts a program, and where it is."""
    for path in sorted(Path(process.__file__).parent.rglob("*.py")):
        if path.name == "process.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "process.run",
                "subprocess.run",
                "subprocess.Popen",
                "os.system",
            }:
                yield f"{path.name}:{node.lineno}", node


def test_whatever_opens_an_image_or_a_disk_is_confined_and_limited() -> None:
    found = list(calls())
    assert len(found) >= 8
    for where, call in found:
        words = call.args[0]
        first = ast.unparse(words).strip("[(*)]").replace("'", "").split(", ")
        if tuple(first[:2]) in HARMLESS:
            continue
        keywords = {keyword.arg for keyword in call.keywords}
        assert keywords >= {"confinement", "limits", "timeout_s"}, f"{where}: {keywords}"


_WITHOUT_LANDLOCK = """
import ctypes, errno, logging, struct, sys
from pathlib import Path
from agent import confinement, process
from agent.confinement import Confinement, _Program, _libc

logging.basicConfig(format="%(message)s")
# Number 444 fails with EPERM: what a kernel without Landlock, or the filter of
# a unit that was not told of it, makes of it.
steps = ((0x20, 0, 0, 0), (0x15, 0, 1, 444), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000))
code = b"".join(struct.pack("=HBBI", *step) for step in steps)
assert _libc.prctl(38, 1, 0, 0, 0) == 0
assert _libc.prctl(22, 2, ctypes.byref(_Program(len(steps), code)), 0, 0) == 0
for _ in range(2):
    done = process.run(["cat", sys.argv[1]], timeout_s=20, confinement=Confinement())
    print(done.stdout.decode(), end="")
try:
    process.run(
        ["/usr/bin/python3", "-c", "import socket; socket.socket()"],
        timeout_s=20, confinement=Confinement(),
    )
except process.ProgramFailed as e:
    print("PermissionError" in e.stderr)
"""


def test_without_landlock_it_goes_on_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("read\n")
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_LANDLOCK, tmp_path / "file"],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.stdout == "read\nread\nTrue\n"
    [warning] = done.stderr.splitlines()
    assert "Landlock: EPERM" in warning
