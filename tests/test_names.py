"""What is wrong with a name is said at the door, and no name meets another's file."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from agent import job
from agent.directory import DirectorySource
from agent.errors import ImageNotFound, InvalidJob
from agent.manifest import base_name
from tests.corpus import names

IMAGE_ID = "fd0cb2f1-8375-44c9-b1f4-3e1f4c4a8ef0"


def document(image_id: str = IMAGE_ID, **flavor: Any) -> dict[str, Any]:
    return {
        "instance": {"name": "web-1"},
        "image": {"id": image_id},
        "flavor": {"vcpus": 1, "ram": 64, "disk": 1, **flavor},
    }


def test_an_honest_job_is_accepted() -> None:
    parsed = job.parse(document())
    assert parsed.image is not None
    assert parsed.image.id == IMAGE_ID


@pytest.mark.parametrize("name", names.IMAGE_IDS)
def test_a_hostile_image_id_is_refused_at_the_door(name: str, tmp_path: Path) -> None:
    image_id = names.IMAGE_IDS[name]
    with pytest.raises(InvalidJob, match=r"image\.id"):
        job.parse(document(image_id))
    source = DirectorySource(tmp_path / "images")
    with pytest.raises(InvalidJob):
        source.add([b"x"], disk_format="raw", name="x", image_id=image_id)
    with pytest.raises(ImageNotFound):
        source.get(image_id)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_one_image_has_one_name_however_it_is_spelled() -> None:
    for spelling in (IMAGE_ID.upper(), IMAGE_ID.title(), IMAGE_ID):
        parsed = job.parse(document(spelling))
        assert parsed.image is not None
        assert parsed.image.id == IMAGE_ID


def test_no_image_gets_the_base_of_another() -> None:
    bases = {base_name(image_id) for image_id in names.FOREIGN_IDS}
    assert len(bases) == len(names.FOREIGN_IDS)
    assert not bases & {base_name(IMAGE_ID), *names.FOREIGN_IDS}
    assert all(len(base) == 40 and set(base) <= set("0123456789abcdef") for base in bases)


@pytest.mark.parametrize(
    "name", [IMAGE_ID, IMAGE_ID.upper(), IMAGE_ID.replace("-", ""), "0-" * 30 + "00"]
)
def test_an_instance_cannot_be_called_like_the_uuid_of_another(name: str) -> None:
    with pytest.raises(InvalidJob, match=r"instance\.name: must not look like a UUID"):
        job.parse({**document(), "instance": {"name": name}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "x"}, "image: should be a mapping, such as {id: 0b46a3c6-25a5-4b9c"),
        ({"instance": ["x"]}, "instance: should be a mapping, such as {name: web-1}"),
        ({"flavor": 1}, "flavor: should be a mapping, such as {vcpus: 1, ram: 512, disk: 10}"),
        (
            {"flavor": {"vcpus": 1, "ram": 1, "disk": 1, "ephemeral": [10]}},
            "flavor.ephemeral.0: should be a mapping, such as {size: 10} (it is 10)",
        ),
        ({"libvirt": "no"}, "libvirt: should be a mapping, such as {start: false}"),
        ({"networks": ["x"]}, "networks.0: should be a mapping, such as {network: default}"),
        ({"networks": "x"}, "networks: should be a list (it is 'x')"),
        (
            {"networks": [{"bridge": "br0", "mac": "52-54"}]},
            "networks.0.mac: should look like 52:54:00:12:34:56 (it is '52-54')",
        ),
        ({"request_id": "x"}, "request_id: should match pattern '^req-"),
        (
            {"instance": {"name": "web-1", "metadata": {"a": 1, "b": True, "c": None}}},
            (
                "instance.metadata.a: should be a text: put it in quotes (it is 1); "
                "instance.metadata.b: should be a text: put it in quotes; "
                "instance.metadata.c: should be a text"
            ),
        ),
        (
            {"instance": {"name": "web-1", "metadata": "x"}},
            "instance.metadata: should be a mapping, such as {name: value} (it is 'x')",
        ),
        (
            {"instance": {"name": "web-1", "metadata": {"a": "\ud800"}}},
            "instance.metadata.a: should be a valid string",
        ),
    ],
)
def test_what_a_value_should_be_is_said_in_words_of_the_file(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidJob) as refused:
        job.parse({**document(), **fields})
    assert refused.value.message.startswith(message)


def test_every_mapping_of_a_job_has_an_example_that_is_valid() -> None:
    for name, example in job._EXAMPLES.items():
        getattr(job, name).model_validate(yaml.safe_load(example))
    assert {model.__name__ for model in job._MODELS.values()} == job._EXAMPLES.keys()


@pytest.mark.parametrize("name", names.FLAVORS)
def test_a_hostile_flavor_is_refused_at_the_door(name: str) -> None:
    [field] = names.FLAVORS[name]
    with pytest.raises(InvalidJob, match=rf"flavor\.{field}"):
        job.parse(document(**names.FLAVORS[name]))
