"""A length of time on the command line: 90s, 30m, 12h, 7d, 2w."""

import re
from typing import Final

import click

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Duration(click.ParamType[float]):
    """Becomes seconds."""

    name = "time"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        match = re.fullmatch(r"(\d{1,7}(?:\.\d{1,3})?)([smhdw])", str(value))
        if match is None or float(match[1]) == 0:
            self.fail(f"{value!r} is no time: a number and s, m, h, d or w, like 7d", param, ctx)
        return float(match[1]) * _SECONDS[match[2]]
