"""The connection to a Ceph cluster, on one in memory; the real one is in functional/test_rbd.py."""

import errno
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.ceph import Cluster, Connection
from agent.errors import AgentStopping, BackendError, InsufficientFreeSpace
from tests.fake_ceph import FSID, FakeCeph

KEY = "AQBbKXVmAAAAABAA0v6u0l0hbD9T0tX2Zw0m8w=="


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def ceph() -> FakeCeph:
    return FakeCeph()


def cluster(ceph: FakeCeph, *, clock: Callable[[], float] = time.monotonic) -> Cluster:
    return Cluster(
        Path("/etc/ceph/ceph.conf"),
        "bootwright",
        connect_timeout_s=5,
        call_limit_s=7,
        bindings=ceph.bindings(),
        clock=clock,
    )


def names(connection: Connection) -> list[str]:
    with connection.pool("vms") as pool:
        return pool.names()


def test_nothing_is_connected_before_the_first_call(ceph: FakeCeph) -> None:
    subject = cluster(ceph)
    assert ceph.clients == []
    subject.call(names)
    subject.call(names)
    [client] = ceph.clients
    assert (client.conffile, client.name) == ("/etc/ceph/ceph.conf", "client.bootwright")


def test_every_call_has_a_limit(ceph: FakeCeph) -> None:
    cluster(ceph).connection()
    [client] = ceph.clients
    assert client.options["rados_osd_op_timeout"] == "7"
    assert client.options["rados_mon_op_timeout"] == "7"


def test_limit_that_somebody_has_configured_stays(ceph: FakeCeph) -> None:
    ceph.options["rados_osd_op_timeout"] = "300"
    cluster(ceph).connection()
    assert ceph.clients[0].options["rados_osd_op_timeout"] == "300"


def test_failure_to_connect_says_what_to_look_at_and_is_not_repeated(ceph: FakeCeph) -> None:
    ceph.failures["connect"] = [errno.ETIMEDOUT]
    subject = cluster(ceph)
    with pytest.raises(BackendError, match=r"connecting to Ceph as client\.bootwright") as caught:
        subject.call(names)
    assert "images_rbd_ceph_conf" in caught.value.hint
    assert ceph.clients == []
    assert subject.call(names) == []


@pytest.mark.parametrize("number", [errno.ESHUTDOWN, errno.ENOTCONN, errno.ETIMEDOUT])
def test_lost_connection_is_replaced_and_the_work_done_again(ceph: FakeCeph, number: int) -> None:
    subject = cluster(ceph)
    first = subject.connection()
    ceph.failures["list"] = [number]
    assert subject.call(names) == []
    assert first.lost
    assert subject.connection() is not first
    assert len(ceph.clients) == 2


def test_lost_connection_is_replaced_once(ceph: FakeCeph) -> None:
    subject = cluster(ceph)
    ceph.failures["list"] = [errno.ESHUTDOWN, errno.ESHUTDOWN]
    with pytest.raises(BackendError, match="listing pool vms"):
        subject.call(names)
    # What comes next begins with another one all the same.
    assert subject.call(names) == []
    assert len(ceph.clients) == 3


def test_cluster_that_cannot_be_reached_again_says_so(ceph: FakeCeph) -> None:
    subject = cluster(ceph)
    subject.connection()
    ceph.blocklist()
    ceph.failures["connect"] = [errno.ETIMEDOUT]
    with pytest.raises(BackendError, match="connecting to Ceph"):
        subject.call(names)


def test_other_errors_do_not_cost_the_connection(ceph: FakeCeph) -> None:
    subject = cluster(ceph)
    before = subject.connection()
    ceph.failures["list"] = [errno.EPERM]
    with pytest.raises(BackendError, match=r"listing pool vms: EPERM .*ceph -s"):
        subject.call(names)
    assert subject.connection() is before


def test_error_of_the_work_itself_is_not_a_lost_connection(ceph: FakeCeph) -> None:
    subject = cluster(ceph)

    def stop(_connection: Connection) -> None:
        raise AgentStopping("the agent is stopping")

    with pytest.raises(AgentStopping):
        subject.call(stop)
    assert len(ceph.clients) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_cluster_is_said_to_be_full(ceph: FakeCeph, number: int) -> None:
    ceph.failures["list"] = [number]
    with pytest.raises(InsufficientFreeSpace, match=r"listing pool vms: .*full"):
        cluster(ceph).call(names)


def test_pool_that_is_not_there_is_named(ceph: FakeCeph) -> None:
    connection = cluster(ceph).connection()
    with (
        pytest.raises(BackendError, match="opening pool wms: pool wms does not exist"),
        connection.pool("wms"),
    ):
        pass


def test_addresses_of_monitors_are_taken_apart(ceph: FakeCeph) -> None:
    ceph.monitors = ["10.0.0.1:6789/0", "[fd00::1]:6790/0", "10.0.0.3:3300"]
    assert cluster(ceph).connection().monitors() == (
        ("10.0.0.1", 6789),
        ("fd00::1", 6790),
        ("10.0.0.3", 3300),
    )


def test_monitors_are_asked_for_now_and_then(ceph: FakeCeph) -> None:
    clock = Clock()
    connection = cluster(ceph, clock=clock).connection()
    before = connection.monitors()
    ceph.monitors = ["10.0.0.9:6789/0"]
    clock.now += 299
    assert connection.monitors() == before
    clock.now += 2
    assert connection.monitors() == (("10.0.0.9", 6789),)


def test_new_connection_asks_for_the_monitors_anew(ceph: FakeCeph) -> None:
    subject = cluster(ceph)
    subject.connection().monitors()
    ceph.monitors = ["10.0.0.9:6789/0"]
    ceph.blocklist()
    subject.call(names)
    assert subject.connection().monitors() == (("10.0.0.9", 6789),)


def test_monitors_that_do_not_answer_cost_the_connection(ceph: FakeCeph) -> None:
    subject = cluster(ceph)
    ceph.failures["mon_command"] = [errno.ETIMEDOUT]
    assert subject.call(lambda ceph: ceph.monitors()) == (("10.0.0.1", 6789),)
    assert len(ceph.clients) == 2


def test_monitors_that_refuse_are_told_with_what_is_needed(ceph: FakeCeph) -> None:
    ceph.failures["mon_command"] = [errno.EACCES]
    with pytest.raises(BackendError, match=r"Permission denied .*mon 'profile rbd'"):
        cluster(ceph).call(lambda ceph: ceph.monitors())
    assert len(ceph.clients) == 1


def test_key_is_found_in_the_keyrings_that_are_configured(ceph: FakeCeph, tmp_path: Path) -> None:
    ceph.keyring(tmp_path / "keyring", "bootwright", KEY)
    assert cluster(ceph).connection().key() == KEY.encode()


@pytest.mark.parametrize("content", [b"no keyring", b"\xff\xfe", b"[client.bootwright]\n\tcaps=x"])
def test_keyring_without_the_key_is_named(ceph: FakeCeph, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keyring"
    path.write_bytes(content)
    ceph.options["keyring"] = str(path)
    with pytest.raises(BackendError, match=rf"key of client\.bootwright: {path}"):
        cluster(ceph).connection().key()


def test_key_of_somebody_else_is_not_taken(ceph: FakeCeph, tmp_path: Path) -> None:
    ceph.keyring(tmp_path / "keyring", "admin", KEY)
    with pytest.raises(BackendError, match="no keyring has the key"):
        cluster(ceph).connection().key()


def test_id_of_the_cluster(ceph: FakeCeph) -> None:
    assert cluster(ceph).connection().fsid == FSID
