"""A real Ceph cluster on loopback: one monitor, one OSD that keeps all in memory, cephx.

    with Ceph(tmp_path / "ceph") as ceph:
        ceph.conf, ceph.make_user(…)

No kernel support and no manager: images in pools are all it is for. The ports are the kernel's
choice. Everything lies below its directory; its two daemons are our children and end with us.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from agent import ceph_bindings

GLANCE: Final = "glance"
"""The user of a Glance that keeps its images here, in the pool `images`."""
_START_LIMIT_S: Final = 60.0

_CONF: Final = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]
ms_bind_ipv6 = false
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
auth_allow_insecure_global_id_reclaim = false
keyring = {root}/$name.keyring
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 8
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_warn_on_pool_no_redundancy = false
[mon]
# A second for each change of a map would be most of what a start takes.
paxos_propose_interval = 0.05
paxos_min_wait = 0.02
mon_data = {root}/mon.a
keyring = {root}/mon.a/keyring
log_file = {root}/mon.log
mon_cluster_log_file = {root}/cluster.log
run_dir = {root}
admin_socket =
mon_data_avail_warn = 2
mon_data_avail_crit = 1
[osd]
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
osd_data = {root}/osd.0
keyring = {root}/osd.0/keyring
osd_objectstore = memstore
memstore_device_bytes = 4G
osd_class_load_list = *
osd_class_default_list = *
osd_op_num_shards = 2
osd_fast_shutdown = true
log_file = {root}/osd.log
run_dir = {root}
admin_socket =
"""


class Ceph:
    """A cluster of its own; a context manager that starts and stops it.

    Attributes:
        conf: its configuration, readable by everybody.
        fsid: its id.
    """

    def __init__(self, root: Path, *, pools: Sequence[str] = ("vms", "images")) -> None:
        root.mkdir()
        root.chmod(0o755)
        self.root = root
        self.conf = root / "ceph.conf"
        self.fsid = str(uuid.uuid4())
        self._pools = pools
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._admin: Any = None

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._admin is not None:
            self._admin.shutdown()
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _start(self) -> None:
        v2, v1 = _free_ports()
        self.conf.write_text(_CONF.format(fsid=self.fsid, v2=v2, v1=v1, root=self.root))
        for name in ("mon.a", "osd.0"):
            (self.root / name).mkdir()
        self._make_monitor(v2, v1)
        self._spawn("ceph-mon")
        self._admin = self._connect()
        self._make_osd()
        self._spawn("ceph-osd")
        for pool in self._pools:
            self.command("osd pool create", pool=pool, pg_num=8, pgp_num=8, size=1)
            self.command("osd pool application enable", pool=pool, app="rbd")
        self.make_user(GLANCE, writes=("images",))
        deadline = time.monotonic() + _START_LIMIT_S
        while not self.command("osd stat")["num_up_osds"]:
            if time.monotonic() > deadline:
                raise TimeoutError("the OSD does not come up")
            time.sleep(0.05)

    def _make_monitor(self, v2: int, v1: int) -> None:
        keyring, monmap = self.root / "mon.keyring", self.root / "monmap"
        admin = self.root / "client.admin.keyring"
        _run("ceph-authtool", "--create-keyring", keyring, "--gen-key", "-n", "mon.", "--cap",
             "mon", "allow *")  # fmt: skip
        _run("ceph-authtool", "--create-keyring", admin, "--gen-key", "-n", "client.admin",
             "--cap", "mon", "allow *", "--cap", "osd", "allow *")  # fmt: skip
        _run("ceph-authtool", keyring, "--import-keyring", admin)
        address = f"[v2:127.0.0.1:{v2},v1:127.0.0.1:{v1}]"
        _run("monmaptool", "--create", "--fsid", self.fsid, "--addv", "a", address, monmap)
        _run("ceph-mon", "-c", self.conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring",
             keyring)  # fmt: skip

    def _make_osd(self) -> None:
        key = _run("ceph-authtool", "--gen-print-key").strip()
        osd = str(uuid.uuid4())
        self.command("osd new", json.dumps({"cephx_secret": key}).encode(), uuid=osd)
        _write_keyring(self.root / "osd.0/keyring", "osd.0", key)
        _run("ceph-osd", "-c", self.conf, "-i", "0", "--mkfs", "--osd-uuid", osd)

    def _spawn(self, program: str) -> None:
        name = {"ceph-mon": "a", "ceph-osd": "0"}[program]
        with (self.root / f"{program}.out").open("wb") as log:
            self._daemons.append(
                subprocess.Popen(
                    [program, "-f", "-c", self.conf, "-i", name],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )

    def _connect(self) -> Any:
        admin = ceph_bindings.load().rados.Rados(conffile=os.fspath(self.conf), name="client.admin")
        admin.connect(timeout=_START_LIMIT_S)
        return admin

    def command(self, prefix: str, data: bytes = b"", **arguments: object) -> Any:
        """Have the monitor do something; return what it answers."""
        request = json.dumps({"prefix": prefix, "format": "json", **arguments})
        status, answer, error = self._admin.mon_command(request, data)
        if status:
            raise RuntimeError(f"{prefix}: {error}")
        return json.loads(answer) if answer.strip() else None

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Stop the OSD, so that whoever asks for an image waits."""
        osd = self._daemons[-1]
        osd.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            osd.send_signal(signal.SIGCONT)

    def make_user(
        self,
        name: str,
        *,
        writes: Sequence[str],
        reads: Sequence[str] = (),
        group: str | None = None,
    ) -> Path:
        """Make a user with these pools; return its keyring, which `group` may read."""
        profiles = [
            *(f"profile rbd pool={pool}" for pool in writes),
            *(f"profile rbd-read-only pool={pool}" for pool in reads),
        ]
        caps = ["mon", "profile rbd", "osd", ", ".join(profiles)]
        [answer] = self.command("auth get-or-create", entity=f"client.{name}", caps=caps)
        path = self.root / f"client.{name}.keyring"
        _write_keyring(path, f"client.{name}", answer["key"])
        if group is not None:
            shutil.chown(path, "root", group)
            path.chmod(0o640)
        return path

    def rbd(self, *words: str | Path) -> str:
        """Run `rbd …` as the administrator; return what it prints."""
        return _run("rbd", "-c", self.conf, *words)

    def images(self, pool: str) -> set[str]:
        return set(json.loads(self.rbd("ls", "--format", "json", pool)))


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        for each in (one, other):
            each.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


def _write_keyring(path: Path, entity: str, key: str) -> None:
    path.touch(mode=0o600)
    path.write_text(f"[{entity}]\n\tkey = {key}\n")


def _run(*argv: str | Path) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{argv}: {done.stderr}")
    return done.stdout
