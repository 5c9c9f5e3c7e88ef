"""The configuration files as text: which are read, what stands in them.

What the lines mean is the business of `agent.config`; only a client of the
agent, which needs nothing but the place of the socket, gets it from here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from oslo_config import cfg, iniparser

DEFAULT_FILE: Final = Path("/etc/bootwright/bootwright.conf")
DEFAULT_DIRECTORY: Final = Path("/etc/bootwright/bootwright.conf.d")

ABSOLUTE_PATH: Final = r"^/[^\0]*$"

API: Final[list[cfg.Opt]] = [
    cfg.StrOpt(
        "socket",
        default="/run/bootwright/bootwright.sock",
        regex=ABSOLUTE_PATH,
        help="Unix socket of the API: an absolute path of at most 107 bytes.",
    ),
    cfg.StrOpt(
        "socket_group",
        help="Group whose members may use the API, and with it control every instance of this "
        "host; the group of the agent's user if not set.",
    ),
    cfg.StrOpt(
        "metrics_listen",
        regex=r"^(\[[0-9A-Fa-f:.]+\]|[0-9.]+):[0-9]{1,5}$",
        help="IP address and port, such as 127.0.0.1:9177 or [::1]:9177, that serves /metrics, "
        "/healthz and /readyz over plain HTTP and without authentication; nothing else of the "
        "API is there. Not served if not set.",
    ),
]
"""The options of [api]: here, and not in `agent.options`, because a client needs no others."""

_NOT_READABLE: Final = "not readable by this user; try as root"


class ConfigError(Exception):
    """The configuration cannot be used; `problems` names each with its file and option."""

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join(self.problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """One line of a configuration file."""

    file: str
    section: str
    key: str
    value: str


class Unreadable(ConfigError):
    """A file exists and may not be read."""


def find(files: Sequence[str], directories: Sequence[str]) -> list[str]:
    """Return the files to read, in order: `files`, then every .conf file of `directories`.

    If both are empty, the default file and directory where they exist.

    Raises:
        ConfigError: there is no such directory.
        Unreadable: a directory is closed to this user.
    """
    if not files and not directories:
        try:
            files = [str(DEFAULT_FILE)] if DEFAULT_FILE.exists() else []
            directories = [str(DEFAULT_DIRECTORY)] if DEFAULT_DIRECTORY.is_dir() else []
        except PermissionError as e:
            raise Unreadable(f"{DEFAULT_FILE.parent}: {_NOT_READABLE}") from e
    found = list(files)
    for directory in directories:
        try:
            there = Path(directory).is_dir()
        except PermissionError as e:
            raise Unreadable(f"{directory}: {_NOT_READABLE}") from e
        if not there:
            raise ConfigError(f"{directory}: no such directory of configuration files")
        found += sorted(str(file) for file in Path(directory).glob("*.conf"))
    return found


def parse(conf: cfg.ConfigOpts, files: Sequence[str]) -> None:
    """Let `conf` read `files`.

    Raises:
        Unreadable: permission denied.
        ConfigError: no such file, or it is none of ours.
    """
    try:
        conf(
            [],
            project="bootwright",
            default_config_files=list(files),
            default_config_dirs=[],
        )
    except cfg.ConfigFilesPermissionDeniedError as e:
        raise Unreadable(f"{', '.join(e.config_files)}: {_NOT_READABLE}") from e
    except cfg.ConfigFilesNotFoundError as e:
        raise ConfigError(f"{', '.join(e.config_files)}: no such configuration file") from e
    except (cfg.Error, OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{', '.join(files)}: {e}") from e


def assignments(file: str) -> Iterator[Assignment]:
    """Yield what `file` says, known or not.

    Raises:
        Unreadable: permission denied.
        ConfigError: no such file, or it is none of ours.
    """
    sections: dict[str, dict[str, list[str]]] = {}
    try:
        cfg.ConfigParser(file, sections).parse()
    except FileNotFoundError as e:
        raise ConfigError(f"{file}: no such configuration file") from e
    except PermissionError as e:
        raise Unreadable(f"{file}: {_NOT_READABLE}") from e
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file}: {e}") from e
    except iniparser.ParseError as e:
        raise ConfigError(str(e)) from e
    for section, keys in sections.items():
        # oslo.config knows sections by their lower-case name, all but this one.
        name = "DEFAULT" if section.upper() == "DEFAULT" else section.lower()
        for key, values in keys.items():
            for value in values:
                yield Assignment(file=file, section=name, key=key, value=value)


def api_socket(files: Sequence[str] = (), directories: Sequence[str] = ()) -> Path:
    """Where the agent listens, for its clients: reads nothing else and warns of nothing.

    A default file that may not be read (it can hold a password) counts as absent.

    Raises:
        ConfigError: a file cannot be read, or holds no usable path.
    """
    conf = cfg.ConfigOpts()
    conf.register_opts(API, group="api")
    try:
        parse(conf, find(files, directories))
    except Unreadable:
        if files or directories:
            raise
        parse(conf, [])
    try:
        return Path(conf.api.socket)
    except ValueError as e:
        raise ConfigError(
            "[api] socket is set to something that is no absolute path: 'bootwright config check' "
            "tells where"
        ) from e
