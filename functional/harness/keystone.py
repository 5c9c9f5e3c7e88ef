"""A real Keystone on loopback, for a Glance that checks tokens.

    venv = glance.install(cache)
    with Keystone(venv, tmp_path / "keystone", token_ttl=5) as keystone:
        with Glance(venv, tmp_path / "glance", keystone=keystone):
            session = keystone.session("demo")

It shares Glance's virtualenv. Users are `admin` (role admin), `demo` (role member) and the
service's own `glance`; each has its name as password and a project of its name.

keystoneauth asks for a new token two minutes before the old one expires. With a shorter
`token_ttl` its sessions therefore get one for every request, and only a token used on its own
shows what expiry does.
"""

import os
import subprocess
from pathlib import Path

from keystoneauth1.identity import v3
from keystoneauth1.session import Session

from functional.harness.openstack_venv import copy_prepared
from functional.harness.wsgi_server import WsgiServer, WsgiService

_ROLES = {"glance": ("admin", "service"), "demo": ("member",)}


class Keystone(WsgiService):
    """A Keystone with users and tokens of its own; a context manager that starts and stops it.

    Args:
        venv: what `glance.install` returned.
        root: a directory that does not exist yet; holds the database, keys and logs.
        token_ttl: seconds a token is valid.
    """

    def __init__(self, venv: Path, root: Path, *, token_ttl: int = 3600) -> None:
        copy_prepared(venv, "keystone", _create, root)
        _write_config(root, token_ttl)
        server = WsgiServer(
            venv=venv,
            application="keystone.wsgi.api:application",
            root=root,
            environment={"OS_KEYSTONE_CONFIG_DIR": str(root)},
            health_path="/v3",
        )
        super().__init__(server)
        self.auth_url = f"{server.url}/v3"
        self._admin = self.session("admin")

    def _begin(self) -> None:
        super()._begin()
        self.add_service("identity", self.auth_url)
        self._add_users()

    def session(self, user: str) -> Session:
        """Return a session of `user`, which gets tokens as it needs them."""
        auth = v3.Password(
            self.auth_url,
            username=user,
            password=user,
            project_name=user,
            user_domain_id="default",
            project_domain_id="default",
        )
        return Session(auth, timeout=60)

    def token(self, user: str) -> str:
        """Return a new token of `user`, which nothing renews."""
        return str(self.session(user).get_token())

    def add_service(self, kind: str, url: str) -> None:
        """Put a service of type `kind` into the catalogue."""
        service = self._create_entity("service", type=kind, name=kind)
        for interface in ("public", "internal"):
            self._create_entity(
                "endpoint", service_id=service, interface=interface, url=url, region="RegionOne"
            )

    def _add_users(self) -> None:
        found = self._admin.get(f"{self.auth_url}/roles", authenticated=True).json()["roles"]
        role_ids = {role["name"]: role["id"] for role in found}
        for name, roles in _ROLES.items():
            project = self._create_entity("project", name=name, domain_id="default")
            user = self._create_entity("user", name=name, password=name, domain_id="default")
            for role in roles:
                grant = f"projects/{project}/users/{user}/roles/{role_ids[role]}"
                self._admin.put(f"{self.auth_url}/{grant}")

    def _create_entity(self, kind: str, **attributes: str) -> str:
        answer = self._admin.post(f"{self.auth_url}/{kind}s", json={kind: attributes})
        return str(answer.json()[kind]["id"])


def _write_config(root: Path, token_ttl: int) -> Path:
    path = root / "keystone.conf"
    path.write_text(
        f"""\
[database]
connection = sqlite:///{root}/keystone.db?timeout=60
sqlite_synchronous = false
[token]
expiration = {token_ttl}
[fernet_tokens]
key_repository = {root}/fernet-keys
[identity]
# bcrypt at its cheapest.
password_hash_rounds = 4
""",
        "utf-8",
    )
    return path


def _create(venv: Path, root: Path) -> None:
    """Make a database with nobody but `admin` in it, and the keys that sign tokens."""
    config = _write_config(root, token_ttl=3600)
    owner = ("--keystone-user", str(os.getuid()), "--keystone-group", str(os.getgid()))
    for arguments in (
        ("db_sync",),
        ("fernet_setup", *owner),
        ("bootstrap", "--bootstrap-password", "admin"),
    ):
        subprocess.run(
            [str(venv / "bin/keystone-manage"), "--config-file", str(config), *arguments],
            check=True,
            timeout=300,
        )
