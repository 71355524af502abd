"""The only place in kvmesh.local that removes folders: work folders that it made itself, and nothing else.

A work folder is absolute, stands at one of two places, and holds a marker that names the mesh it was made for. A path
that comes out of mesh.json, or is empty, relative, a link, or around the current folder, is refused loudly.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from kvmesh.errors import Internal

MARKER = ".kvmesh-work"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
# Engines make sockets two levels below the work folder, and a socket's path has 107 bytes at most.
LONGEST = 60
_SHORT = re.compile(r"/tmp/kvmesh-[A-Za-z0-9_]+")


class Refused(Internal):
    """A path that is not ours to remove."""


def make(root: Path) -> Path:
    """A new, empty, marked work folder for the mesh whose folder is `root`.

    It is `root/work`, or a folder in /tmp where that would be too long for a socket. Raises Refused for a `root` that
    is not absolute, or when something unmarked is in the place.
    """
    if not root.is_absolute():
        raise Refused(f"mesh folder {str(root)!r} is not absolute")
    work = root / "work"
    if len(os.fsencode(work)) > LONGEST:
        work = Path(tempfile.mkdtemp(prefix="kvmesh-", dir="/tmp"))
    else:
        # Left unmarked by a process that was killed right here; rmdir takes an empty folder only.
        with contextlib.suppress(OSError):
            work.rmdir()
        remove(work, root)
        work.mkdir()
    (work / MARKER).write_text(f"{root}\n")
    return work


def check_place(work: Path, root: Path) -> None:
    """Raises Refused unless `work` is a path that `make(root)` could have given, whether it exists or not."""
    if not work.is_absolute() or not root.is_absolute():
        raise Refused(f"will not remove {str(work)!r}: it is not absolute")
    if work != root / "work" and not _SHORT.fullmatch(str(work)):
        raise Refused(f"will not remove {str(work)!r}: it is neither {root / 'work'} nor /tmp/kvmesh-*")


def check(work: Path, root: Path) -> None:
    """Raises Refused unless `work` is an existing work folder that `make(root)` made."""
    check_place(work, root)
    why = ""
    if work.is_symlink() or not work.is_dir():
        why = "no folder of its own"
    elif work.stat().st_uid != os.getuid():
        why = "somebody else's"
    elif Path.cwd().is_relative_to(work.resolve()):
        why = "around the current folder"
    elif not (work / MARKER).is_file() or (work / MARKER).read_text() != f"{root}\n":
        why = f"not marked as made for {root}"
    if why:
        raise Refused(f"will not remove {str(work)!r}: it is {why}")


def remove(work: Path, root: Path) -> None:
    """Removes a work folder that `make(root)` made; nothing if it is gone. Raises Refused for anything else."""
    check_place(work, root)
    if not os.path.lexists(work):
        return
    check(work, root)
    # The marker goes last, so that a removal that was cut short can be repeated.
    for entry in work.iterdir():
        if entry.name != MARKER:
            _remove_entry(entry)
    (work / MARKER).unlink()
    work.rmdir()


def remove_inside(work: Path, root: Path, name: str) -> None:
    """Removes `work/name`, a folder of one process. Raises Refused for another work folder or a name that is a path."""
    if not NAME.fullmatch(name):
        raise Refused(f"will not remove {name!r}: it is no name of a process")
    check(work, root)
    _remove_entry(work / name)


def _remove_entry(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        # Processes that are just being killed may still touch their files.
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)
