"""The contract of waiting: time-outs, cancellation, and the line that shows how far it is."""

import contextlib
import json
import os
import pty
import subprocess
import threading
import time

from functional.conftest import Images
from functional.contract import MIB, agent, job, throttled
from functional.harness.agent import Agent
from functional.harness.fault_proxy import FaultProxy
from functional.harness.glance import Glance
from functional.harness.leftovers import Leftovers
from functional.harness.libvirtd import PrivateLibvirtd
from tests.waiting import LIMIT_S, until

__all__ = ["agent", "throttled"]


def test_a_cancelled_job_leaves_nothing_and_the_other_waiter_gets_its_image(
    agent: Agent, libvirtd: PrivateLibvirtd, images: Images, glance: Glance, throttled: FaultProxy
) -> None:
    leftovers = Leftovers(agent, libvirtd)
    downloads = glance.downloads(images.disk_raw)
    document = job("impatient", images.disk_raw)

    done = agent.run("boot", "-f", "-", "--timeout", "1", stdin=json.dumps(document))
    assert (done.returncode, done.stdout) == (3, "")
    assert "image_downloading" in done.stderr
    [waiting] = agent.json("job", "list", "--status", "BUILD")["jobs"]
    assert waiting["instance"]["name"] == "impatient"
    other = agent.json("image", "fetch", "--no-wait", images.disk_raw)["jobs"][0]["id"]
    assert agent.run("job", "wait", other, "--timeout", "0.2").returncode == 3
    [fetching] = agent.json("cache", "status")["fetching"]
    assert (fetching["image_id"], fetching["waiters"]) == (images.disk_raw, 2)

    agent.json("job", "cancel", waiting["id"])
    ended = agent.json("job", "wait", waiting["id"], status=1)
    throttled.hurry()

    assert (ended["status"], ended["error"]["code"]) == ("CANCELLED", "Cancelled")
    assert agent.json("job", "cancel", waiting["id"])["status"] == "CANCELLED"
    assert agent.wait(other)["status"] == "DONE"
    assert glance.downloads(images.disk_raw) == downloads + 1
    agent.json("image", "remove", images.disk_raw)
    leftovers.assert_none()


def test_the_last_waiter_that_is_cancelled_ends_the_fetch(
    agent: Agent, libvirtd: PrivateLibvirtd, images: Images, throttled: FaultProxy
) -> None:
    leftovers = Leftovers(agent, libvirtd)
    job_id = agent.submit(job("alone", images.disk_raw))
    until(lambda: agent.json("job", "show", job_id)["progress"] is not None)

    agent.json("job", "cancel", job_id)

    assert agent.wait(job_id, status=1)["status"] == "CANCELLED"
    until(lambda: agent.json("cache", "status")["fetching"] == [])
    sent = throttled.matching[-1].sent
    throttled.hurry()
    time.sleep(0.2)
    assert throttled.matching[-1].sent <= sent + MIB
    if agent.partial(images.disk_raw).exists():
        # What has come is kept for whoever asks next.
        assert agent.json("image", "fetch", images.disk_raw)["jobs"][0]["status"] == "DONE"
        agent.json("image", "remove", images.disk_raw)
    leftovers.assert_none()


def test_one_live_line_on_a_terminal_and_only_the_result_on_a_pipe(
    agent: Agent, images: Images, throttled: FaultProxy
) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        agent.command("--format", "json", "image", "fetch", images.disk_qcow2),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )
    os.close(theirs)
    screen = bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 4096):
                screen.extend(piece)

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: b"MiB/s" in screen or process.poll() is not None)
    throttled.hurry()
    output, _ = process.communicate(timeout=LIMIT_S)
    reader.join()
    os.close(ours)

    assert process.returncode == 0
    [report] = json.loads(output)["jobs"]
    assert report["status"] == "DONE"
    text = screen.decode()
    assert "image_downloading" in text
    assert " of " in text
    assert "MiB/s" in text
    assert "\n" not in text.replace("\r\n", "\n").rstrip("\n").split("image_downloading")[0]
    # The same on a pipe, from the cache.
    done = agent.run("--format", "json", "image", "fetch", images.disk_qcow2)
    assert done.stderr == ""
    assert json.loads(done.stdout)["jobs"][0]["image"]["source"] == "cache"
