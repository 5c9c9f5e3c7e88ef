"""What the agent does while trouble comes to it in the campaign."""

from collections.abc import Callable, Sequence
from typing import Any, Final

from agent.client import Client, Refused
from agent.report import Status
from functional.harness.campaign import Document, Scenario

_UUIDS: Final = [f"6f1d8a0c-55d1-4a53-9b1e-0c1f6a5d9e0{number}" for number in range(1, 6)]


def scenarios_of(*, raw: str, twin: str, qcow2: str, root: str, kernel: str) -> Sequence[Scenario]:
    """Return all scenarios, on the images with these ids.

    `twin` has the bytes of `raw`, `qcow2` is the same disk; `root` is a file system
    that names `kernel`.
    """
    full: dict[str, Any] = {
        "instance": {"config_drive": True, "user_data": "#cloud-config\n"},
        "flavor": {"ephemeral": [{"size": 1, "guest_format": "ext4"}], "swap": 64},
        "images_type": "raw",
    }
    defined = _job(raw, action="boot", libvirt={"start": False})
    return [
        Scenario(name="qcow2-cold", jobs=(_job(qcow2),)),
        Scenario(name="raw-cold", jobs=(_job(raw, images_type="raw"),)),
        Scenario(name="kernel-ramdisk-root", jobs=(_job(root),)),
        Scenario(name="every-disk", before=(_fetch(raw),), jobs=(_job(raw, **full),)),
        Scenario(name="twin", before=(_fetch(raw),), jobs=(_job(twin),)),
        Scenario(name="two-at-once", jobs=(_job(raw), _job(raw, number=2))),
        Scenario(
            name="delete",
            before=(_job(raw, **full),),
            jobs=(_change("delete"),),
        ),
        Scenario(name="remove", before=(_fetch(raw),), call=_removing(raw)),
        Scenario(
            name="prune",
            before=(_fetch(raw), _fetch(twin), _fetch(kernel), _job(qcow2)),
            call=lambda client: client.gc(dry_run=False),
        ),
        Scenario(name="defined", before=(_fetch(raw),), jobs=(defined,)),
        Scenario(
            name="booted",
            before=(_fetch(raw),),
            jobs=(_job(raw, action="boot"),),
            ends=Status.ACTIVE,
            guest_writes=True,
        ),
        Scenario(
            name="resize",
            before=(defined,),
            jobs=(_change("resize", flavor={"vcpus": 2, "ram": 256, "disk": 2}),),
        ),
        Scenario(
            name="rebuild",
            before=(defined, _fetch(qcow2)),
            jobs=(_change("rebuild", image={"id": qcow2}),),
        ),
        Scenario(
            name="rescue",
            before=(defined, _fetch(qcow2)),
            jobs=(_change("rescue", image={"id": qcow2}),),
            ends=Status.ACTIVE,
            guest_writes=True,
        ),
        Scenario(
            name="load",
            before=(_fetch(kernel), _job(raw, images_type="raw")),
            jobs=(
                _job(qcow2, number=2),
                _job(twin, number=3, **full),
                _change("delete"),
                _job(root, number=4),
                _job(qcow2, number=5, images_type="raw"),
                _fetch(raw),
            ),
        ),
    ]


def _job(image: str, *, number: int = 1, **fields: Any) -> Document:
    """Return a job that makes the instance of that number."""
    name = {"uuid": _UUIDS[number - 1], "name": f"campaign-{number}"}
    return {
        "version": 1,
        "action": "prepare",
        "instance": {**name, **fields.pop("instance", {})},
        "flavor": {"vcpus": 1, "ram": 192, "disk": 1, **fields.pop("flavor", {})},
        "image": {"id": image},
        "networks": [],
        **fields,
    }


def _change(action: str, **fields: Any) -> Document:
    """Return a job on the first instance."""
    return {"version": 1, "action": action, "instance": {"uuid": _UUIDS[0]}, **fields}


def _fetch(image: str) -> Document:
    return {"version": 1, "action": "fetch", "image": {"id": image}}


def _removing(image: str) -> Callable[[Client], object]:
    def remove(client: Client) -> None:
        try:
            client.remove_image(image)
        except Refused as e:
            # Done already is what a kill after the last step leaves.
            if e.error.code != "NotFound":
                raise

    return remove
