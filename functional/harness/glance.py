"""A real Glance on loopback: SQLite, file store, gunicorn.

    venv = install(cache)
    with Glance(venv, tmp_path / "glance") as glance:
        image_id = glance.upload(disk, disk_format="raw")

Without a Keystone everybody is the administrator and no token is asked for. With one, tokens are
checked and the methods here act as its `admin`.

A Glance without authentication shows private and serves deactivated images: tests of 401, 403
and 404 for images that exist need the Keystone.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import glanceclient
from keystoneauth1.noauth import NoAuth
from keystoneauth1.session import Session

from functional.harness.ceph import GLANCE, Ceph
from functional.harness.keystone import Keystone
from functional.harness.openstack_venv import copy_prepared, install
from functional.harness.wsgi_server import Answered, WsgiServer, WsgiService

__all__ = ["Glance", "install"]


_DIST_PACKAGES = Path("/usr/lib/python3/dist-packages")


class _Images(Protocol):
    """The calls of glanceclient's image controller that are used here."""

    def create(self, **attributes: object) -> Mapping[str, object]: ...
    def get(self, image_id: str) -> Mapping[str, object]: ...
    def update(self, image_id: str, **attributes: object) -> Mapping[str, object]: ...
    def upload(self, image_id: str, image_data: object) -> None: ...
    def deactivate(self, image_id: str) -> None: ...
    def reactivate(self, image_id: str) -> None: ...
    def delete(self, image_id: str) -> None: ...


class Glance(WsgiService):
    """A Glance with images of its own; a context manager that starts and stops it.

    Args:
        venv: what `install` returned.
        root: a directory that does not exist yet; holds the database, images and logs.
        keystone: a running one, to check tokens with; None for no authentication.
        show_locations: whether metadata tells where image data is (`direct_url`, `locations`).
        ceph: where it keeps images, in the pool `images`; None for files.
        ceph_is_second: it keeps them in files, and copies them to a store `ceph` if asked to.

    Attributes:
        url: without `/v2` and without a slash at the end.
        store: the directory with one file per image, named by its id; a test may damage them.
    """

    def __init__(
        self,
        venv: Path,
        root: Path,
        *,
        keystone: Keystone | None = None,
        show_locations: bool = False,
        ceph: Ceph | None = None,
        ceph_is_second: bool = False,
    ) -> None:
        copy_prepared(venv, "glance", _create, root)
        _write_config(
            venv,
            root,
            keystone,
            show_locations=show_locations,
            ceph=ceph,
            ceph_is_second=ceph_is_second,
        )
        server = WsgiServer(
            venv=venv,
            application="glance.wsgi.api:application",
            root=root,
            environment={
                "OS_GLANCE_CONFIG_DIR": str(root),
                **({} if ceph is None else {"PYTHONPATH": str(_ceph_modules(root))}),
            },
            health_path="/healthcheck",
        )
        super().__init__(server)
        self._keystone = keystone
        self.url = server.url
        self.store = root / "images"
        session = Session(NoAuth()) if keystone is None else keystone.session("admin")
        client = glanceclient.Client("2", session=session, endpoint_override=self.url)
        self._images = cast("_Images", client.images)

    def _begin(self) -> None:
        if self._keystone is not None:
            self._keystone.add_service("image", self.url)
        super()._begin()

    def downloads(self, image_id: str) -> int:
        """Count the requests for the image's data, whole or in part, answered or not."""
        return self.access_log.begun(_file_path(image_id))

    def answers(self, image_id: str) -> list[Answered]:
        """Return how the requests for the image's data ended; see `AccessLog.answered`."""
        return self.access_log.answered(_file_path(image_id))

    def upload(
        self,
        path: Path,
        *,
        disk_format: str,
        container_format: str = "bare",
        name: str | None = None,
        properties: Mapping[str, str] | None = None,
        visibility: str = "public",
        min_disk: int = 0,
    ) -> str:
        """Make an active image of a file and return its id.

        Glance refuses what is not what `disk_format` says. A kernel needs `aki`, a ramdisk `ari`,
        for both formats.

        Args:
            path: the data.
            disk_format: what Glance calls it: raw, qcow2, aki, …
            container_format: bare, or the disk format for aki, ari and ami.
            name: the name of the file if None.
            properties: additional ones, like `kernel_id` or `hw_disk_bus`.
            visibility: who sees it: public, or private to `admin`.
            min_disk: GiB that a flavor's root disk must have.
        """
        image_id = self.create_queued(
            disk_format=disk_format,
            container_format=container_format,
            name=path.name if name is None else name,
            properties=properties,
            visibility=visibility,
            min_disk=min_disk,
        )
        with path.open("rb") as data:
            self._images.upload(image_id, data)
        return image_id

    def create_queued(
        self,
        *,
        disk_format: str = "raw",
        container_format: str = "bare",
        name: str = "queued",
        properties: Mapping[str, str] | None = None,
        visibility: str = "public",
        min_disk: int = 0,
    ) -> str:
        """Make an image without data, as `upload` does before it sends any, and return its id."""
        image = self._images.create(
            disk_format=disk_format,
            container_format=container_format,
            name=name,
            visibility=visibility,
            min_disk=min_disk,
            **(properties or {}),
        )
        return str(image["id"])

    def metadata(self, image_id: str) -> dict[str, object]:
        """Return what Glance says about an image; additional properties are keys like others."""
        return dict(self._images.get(image_id))

    def update(self, image_id: str, **attributes: str) -> None:
        """Change attributes and additional properties of an image."""
        self._images.update(image_id, **attributes)

    def deactivate(self, image_id: str) -> None:
        """Forbid downloads; with a Keystone, they are answered with 403."""
        self._images.deactivate(image_id)

    def reactivate(self, image_id: str) -> None:
        """Allow downloads again."""
        self._images.reactivate(image_id)

    def delete(self, image_id: str) -> None:
        """Delete an image and its data; downloads that run go on to their end."""
        self._images.delete(image_id)


def _ceph_modules(root: Path) -> Path:
    """A directory with Ceph's Python modules, for a virtualenv without Debian's other ones."""
    directory = root / "ceph-modules"
    directory.mkdir()
    for name in ("rados", "rbd"):
        [module] = _DIST_PACKAGES.glob(f"{name}.cpython-*.so")
        (directory / module.name).symlink_to(module)
    return directory


def _file_path(image_id: str) -> str:
    return f"/v2/images/{image_id}/file"


def _write_config(
    venv: Path,
    root: Path,
    keystone: Keystone | None,
    *,
    show_locations: bool,
    ceph: Ceph | None = None,
    ceph_is_second: bool = False,
) -> Path:
    path = root / "glance-api.conf"
    stores = {}
    if ceph is None or ceph_is_second:
        stores["local"] = "file", f"filesystem_store_datadir = {root}/images\n"
    if ceph is not None:
        rbd = f"""\
rbd_store_pool = images
rbd_store_user = {GLANCE}
rbd_store_ceph_conf = {ceph.conf}
"""
        stores["ceph"] = "rbd", rbd
    backends = ", ".join(f"{name}:{kind}" for name, (kind, _) in stores.items())
    sections = "".join(f"[{name}]\n{options}" for name, (_, options) in stores.items())
    text = f"""\
[DEFAULT]
enabled_backends = {backends}
show_image_direct_url = {show_locations}
show_multiple_locations = {show_locations}
[glance_store]
default_backend = {next(iter(stores))}
{sections}\
[os_glance_staging_store]
filesystem_store_datadir = {root}/staging
[os_glance_tasks_store]
filesystem_store_datadir = {root}/tasks
[oslo_concurrency]
lock_path = {root}/lock
[database]
connection = sqlite:///{root}/glance.db?timeout=60
sqlite_synchronous = false
[paste_deploy]
config_file = {venv}/etc/glance/glance-api-paste.ini
"""
    if keystone is None:
        # The default policies want roles and a request without authentication has none. Glance
        # finds the file because it is beside its configuration.
        (root / "policy.yaml").write_text('context_is_admin: "@"\n', "utf-8")
    else:
        text += f"""\
flavor = keystone
[keystone_authtoken]
www_authenticate_uri = {keystone.auth_url}
auth_url = {keystone.auth_url}
auth_type = password
username = glance
password = glance
project_name = glance
user_domain_id = default
project_domain_id = default
service_token_roles_required = true
"""
    path.write_text(text, "utf-8")
    return path


def _create(venv: Path, root: Path) -> None:
    """Make an empty database and the directories that Glance wants to find."""
    for name in ("images", "staging", "tasks", "lock"):
        (root / name).mkdir()
    config = _write_config(venv, root, None, show_locations=False)
    subprocess.run(
        [venv / "bin/glance-manage", "--config-file", config, "db_sync"],
        check=True,
        timeout=300,
    )
    # The copies decide for themselves whether everybody is the administrator.
    (root / "policy.yaml").unlink()
