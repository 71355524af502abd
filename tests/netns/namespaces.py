"""Two hosts in one: network namespaces with an address each and a wire between them, and a /dev/shm of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Sequence

ADDRESSES = ("10.251.77.1", "10.251.77.2")


def ip(*words: str) -> None:
    """One `ip` command. Raises RuntimeError with what it said."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def why_not() -> str:
    """Why namespaces cannot be made here; empty when they can."""
    for program in ("ip", "tc", "unshare", "mount"):
        if shutil.which(program) is None:
            return f"{program} is not installed (iproute2, util-linux)"
    if os.geteuid():
        return "network namespaces need root"
    name = f"kvt{uuid.uuid4().hex[:8]}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except RuntimeError as error:
        return str(error)
    probe = ["unshare", "--mount", "--propagation", "private", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=20, check=False)
    return done.stderr.strip() if done.returncode else ""


class Wire:
    """Both namespaces. Whoever makes it closes it."""

    def __init__(self) -> None:
        mark = uuid.uuid4().hex[:6]
        self.names = [f"kvt{mark}a", f"kvt{mark}b"]
        self._links = [f"kvt{mark}x", f"kvt{mark}y"]
        try:
            for name in self.names:
                ip("netns", "add", name)
            ip("link", "add", self._links[0], "type", "veth", "peer", "name", self._links[1])
            for name, link, address in zip(self.names, self._links, ADDRESSES, strict=True):
                ip("link", "set", link, "netns", name)
                ip("-n", name, "address", "add", f"{address}/24", "dev", link)
                ip("-n", name, "link", "set", link, "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def command(self, side: int, words: Sequence[str]) -> list[str]:
        """What runs `words` on one side, with a /dev/shm of that side's own."""
        shell = 'mount -t tmpfs -o size=256m none /dev/shm && exec "$@"'
        private = ["unshare", "--mount", "--propagation", "private", "sh", "-c", shell, "sh"]
        return ["ip", "netns", "exec", self.names[side], *private, *words]

    def up(self, whether: bool) -> None:
        """Plugs the wire in, or pulls it out."""
        ip("-n", self.names[0], "link", "set", self._links[0], "up" if whether else "down")

    def slow(self, bits: str | None) -> None:
        """Lets so much through each way, such as "20mbit"; None: all."""
        for name, link in zip(self.names, self._links, strict=True):
            base = ["ip", "netns", "exec", name, "tc", "qdisc"]
            subprocess.run([*base, "del", "dev", link, "root"], capture_output=True, timeout=20, check=False)
            if bits is not None:
                limit = ["tbf", "rate", bits, "burst", "64kb", "latency", "100ms"]
                subprocess.run([*base, "add", "dev", link, "root", *limit], timeout=20, check=True)

    def close(self) -> None:
        """Takes everything down; the links go with their namespaces."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False)
