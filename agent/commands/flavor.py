"""A flavor on the command line: VCPUSxRAM_MIBxDISK_GIB."""

import re
from typing import Final

import click

_FLAVOR: Final = re.compile(r"([0-9]+)x([0-9]+)x([0-9]+)")


class Flavor(click.ParamType[dict[str, int]]):
    name = "VCPUSxRAM_MIBxDISK_GIB"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, int]:
        match = _FLAVOR.fullmatch(str(value))
        if match is None:
            self.fail(
                f"{value!r} is no flavor; 2x2048x20, for example, is 2 virtual processors, "
                "2048 MiB of memory and a disk of 20 GiB",
                param,
                ctx,
            )
        vcpus, ram, disk = map(int, match.groups())
        return {"vcpus": vcpus, "ram": ram, "disk": disk}
