"""A program that starts the helper as the agent does and prints what it sees, as JSON.

Not a test: test_privileges.py runs it as the service user, since a test run
can give up its privileges only once.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner
from oslo_config import cfg

from agent import cli, privileges
from privsep import base_images, base_owner, lvm, volumes

FOREIGN = "0d5e6b61602d758984b3bf038267614d6016eb2a"
WAIT_S = 10.0
HUNG_S = 0.2


def holdings() -> dict[str, list[str]]:
    """Capabilities of every thread of this process, by the thread's number."""
    return {
        task.name: privileges.held_capabilities((task / "status").read_text())
        for task in Path("/proc/self/task").iterdir()
    }


def helper() -> int:
    """The helper's process id: this process has no other child."""
    [pid] = children()
    return pid


def children() -> list[int]:
    """The processes this one has started, in whichever thread."""
    tasks = Path("/proc/self/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def refusal(name: object) -> str:
    """The class of what `touch` raised for `name`, "" if it did not."""
    try:
        base_images.touch(name)  # type: ignore[arg-type]  # wrong types are refused too
    except Exception as error:  # noqa: BLE001 - its class is the result
        return type(error).__name__
    return ""


def touch(*names: str) -> dict[str, object]:
    """Start as the agent does; touch each of `names` and all that must be refused."""
    privileges.start_helpers()
    started = threading.Event()
    thread = threading.Thread(target=started.wait, name="late")
    thread.start()
    try:
        os.utime(Path(cfg.CONF.instances_path, "_base", FOREIGN))
        own_attempt = ""
    except OSError as error:
        own_attempt = type(error).__name__
    status = Path(f"/proc/{helper()}/status").read_text()
    result = {
        "own_attempt": own_attempt,
        "refusals": {name: refusal(name) for name in names},
        "not_a_string": [refusal(None), refusal(40), refusal(FOREIGN.encode())],
        "holdings": holdings(),
        "helper_holds": privileges.held_capabilities(status),
        "uid": os.getuid(),
    }
    privileges.verify()
    started.set()
    return result


def die() -> dict[str, object]:
    """Kill the helper; see that it is noticed and that nothing else is started instead."""
    privileges.start_helpers()
    gone = threading.Event()
    privileges.on_helper_exit(gone.set)
    early = gone.is_set()
    os.kill(helper(), signal.SIGKILL)
    noticed = gone.wait(WAIT_S)
    os.wait()
    return {
        "early": early,
        "noticed": noticed,
        "calls": [refusal(FOREIGN), refusal(FOREIGN)],
        "children": children(),
    }


def stop() -> dict[str, object]:
    """Stop both helpers, one of which is dead, and call one all the same."""
    privileges.start_helpers([base_owner, volumes])
    started = children()
    os.kill(min(started), signal.SIGKILL)
    privileges.stop_helpers(WAIT_S)
    return {"started": len(started), "left": children(), "call": refusal(FOREIGN)}


def hung() -> dict[str, object]:
    """Stop a helper that does not end."""
    privileges.start_helpers()
    os.kill(helper(), signal.SIGSTOP)
    began = time.monotonic()
    privileges.stop_helpers(HUNG_S)
    took_s = time.monotonic() - began
    os.kill(helper(), signal.SIGKILL)
    return {"took_s": took_s}


def interrupted() -> dict[str, object]:
    """Send the helper what a terminal sends to the whole process group."""
    privileges.start_helpers()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(helper(), number)
    return {"after": refusal(FOREIGN), "blocked_here": list(signal.pthread_sigmask(0, []))}


def early_thread() -> dict[str, object]:
    """Break the rule that the helper is started before any thread."""
    started = threading.Event()
    threading.Thread(target=started.wait, name="early", daemon=True).start()
    try:
        privileges.start_helpers()
    except privileges.PrivilegesNotDropped as error:
        return {"error": str(error)}
    return {"error": ""}


def start() -> dict[str, object]:
    """Just start, or say what the configuration lacks."""
    try:
        privileges.start_helpers()
    except (ValueError, privileges.HelperNotStarted) as error:
        return {"error": str(error)}
    return {"error": "", "touched": refusal(FOREIGN) == "", "holdings": holdings()}


def both() -> dict[str, object]:
    """Start both helpers; use each; kill one."""
    try:
        privileges.start_helpers([base_owner, volumes])
    except privileges.HelperNotStarted as error:
        return {"error": str(error)}
    started = children()
    helpers = sorted(
        privileges.held_capabilities(Path(f"/proc/{pid}/status").read_text()) for pid in started
    )
    volume_error = ""
    try:
        lvm.finish("../../etc/passwd")
    except Exception as error:  # noqa: BLE001 - its class is the result
        volume_error = type(error).__name__
    touched, alive = refusal(FOREIGN), privileges.helpers_alive()
    gone = threading.Event()
    privileges.on_helper_exit(gone.set)
    found = holdings()
    os.kill(max(started), signal.SIGKILL)
    gone.wait(WAIT_S)
    return {
        "helpers": helpers,
        "holdings": found,
        "touched": touched,
        "volume_error": volume_error,
        "alive": [alive, privileges.helpers_alive()],
    }


def serve(socket: str) -> dict[str, object]:
    """Run the whole agent on `socket`, which cannot be made."""
    configuration = sys.argv[3]
    result = CliRunner().invoke(
        cli.main, ["--config-file", configuration, "--socket", socket, "agent"]
    )
    return {"error": result.stderr, "exit_code": result.exit_code}


def main() -> None:
    scenario, instances_path, configuration, *names = sys.argv[1:]
    logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s %(message)s")
    for talkative in ("stevedore", "oslo_config"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    cfg.CONF(["--config-file", configuration])
    cfg.CONF.set_override("instances_path", instances_path)
    scenarios: dict[str, Callable[..., dict[str, object]]] = {
        "touch": touch,
        "die": die,
        "stop": stop,
        "hung": hung,
        "interrupted": interrupted,
        "early_thread": early_thread,
        "start": start,
        "both": both,
        "serve": serve,
    }
    result = scenarios[scenario](*names)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
