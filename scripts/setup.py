"""Makes .venv ready to run kvmesh and its tests. Standard library only; `make setup` runs it, and so does `make demo`.

What kvmesh stands on (SGLang, torch and the rest: 9 GB) goes into one environment for all clones,
${XDG_CACHE_HOME:-~/.cache}/kvmesh/venvs/KEY, where KEY is a digest of the requirements in pyproject.toml and of the
Python that runs this. It is built once, under a lock; a marker file, written last, says that it is whole. The clone's
own .venv is small: it sees that environment, and holds kvmesh itself as an editable install.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

REPO = Path(__file__).resolve().parent.parent
VENV = REPO / ".venv"
OLDEST = (3, 11)
# Raised when this file builds an environment in another way.
VERSION = 1
# What marks a folder as an environment made here, from its first moment; and what marks it as whole.
MINE, WHOLE = "kvmesh-venv.txt", "kvmesh-venv.complete"
NEEDED_GB = 12
# Seconds between lines about a step that goes on.
REMINDER = 20.0


def main() -> int:
    """Prints a line for each thing that is done; nothing when all is there. Returns the exit status."""
    if sys.version_info < OLDEST:
        fail(
            f"Python {'.'.join(map(str, OLDEST))} or newer is needed, and this is {platform.python_version()} "
            f"({sys.executable}). Name another one: make PYTHON=/path/to/python3 ..."
        )
    project = read_project()
    key = dependency_key(project)
    venvs = cache_home() / "kvmesh" / "venvs"
    if stamped(key, venvs / key):
        return 0
    begun = time.monotonic()
    dependencies = dependency_venv(project, venvs, key)
    clone_venv(dependencies, key)
    say(f"ready after {spent(begun)}")
    return 0


def cache_home() -> Path:
    """$XDG_CACHE_HOME, or ~/.cache."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def read_project() -> dict[str, Any]:
    """The content of pyproject.toml."""
    import tomllib

    with open(REPO / "pyproject.toml", "rb") as f:
        return tomllib.load(f)


def requirements(project: dict[str, Any]) -> list[str]:
    """Everything that pyproject.toml names, for building, running and testing."""
    own = project["project"]
    named = [*project["build-system"]["requires"], *own.get("dependencies", [])]
    for extra in own.get("optional-dependencies", {}).values():
        named += extra
    # An extra that is made of other extras names the project itself.
    itself = re.compile(rf"{re.escape(own['name'])}\s*\[", re.IGNORECASE)
    return sorted({requirement for requirement in named if not itself.match(requirement)})


def dependency_key(project: dict[str, Any]) -> str:
    """Names an environment: 16 hexadecimal digits."""
    parts = [VERSION, requirements(project), sys.version, os.path.realpath(sys.executable), platform.machine()]
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


# The environment of all clones


def dependency_venv(project: dict[str, Any], venvs: Path, key: str) -> Path:
    """The environment's folder, built if it is not there yet."""
    target = venvs / key
    if (target / WHOLE).is_file():
        return target
    venvs.mkdir(parents=True, exist_ok=True)
    with locked(venvs / f"{key}.lock"):
        if (target / WHOLE).is_file():
            return target
        discard(target, venvs)
        build(requirements(project), target)
    return target


def build(names: list[str], target: Path) -> None:
    """Makes the environment at `target`, which does not exist."""
    free = shutil.disk_usage(target.parent).free / 1e9
    if free < NEEDED_GB:
        fail(f"{NEEDED_GB} GB are needed in {target.parent}, {free:.0f} are free. XDG_CACHE_HOME names another place.")
    heavy = ", ".join(n for n in names if n.split("==")[0] in ("sglang", "torch"))
    say(f"installing {heavy or 'the requirements'} and what they need: about 9 GB and 6 minutes, once on this machine")
    say(f"  into {target}")
    target.mkdir()
    (target / MINE).write_text(f"{target}\n")
    log = target.parent / f"{target.name}.log"
    log.write_bytes(b"")
    begun = time.monotonic()
    run("making the environment", [sys.executable, "-m", "venv", str(target)], log)
    pip = [str(target / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    run("installing", [*pip, "--progress-bar=off", *names], log)
    (target / WHOLE).write_text("\n".join(names) + "\n")
    say(f"  installed in {spent(begun)}")


def discard(target: Path, venvs: Path) -> None:
    """Removes a half-built environment that `build` began here; refuses anything else."""
    if not os.path.lexists(target):
        return
    ours = (
        target.is_absolute()
        and target.parent == venvs
        and re.fullmatch(r"[0-9a-f]{16}", target.name)
        and target.is_dir()
        and not target.is_symlink()
        and is_file_with(target / MINE, f"{target}\n")
        and not Path.cwd().is_relative_to(target)
    )
    if not ours:
        fail(f"{target} is in the way, and was not made here: remove it yourself")
    say(f"  {target} was left half-built: beginning again")
    # The marker goes last, so that a removal that was cut short can be repeated.
    for entry in target.iterdir():
        if entry.name != MINE:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    (target / MINE).unlink()
    target.rmdir()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; says so when it has to wait."""
    with open(path, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up is installing the same requirements: waiting for it")
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


# The clone's own environment


def clone_venv(dependencies: Path, key: str) -> None:
    """Makes .venv see the dependencies, and installs kvmesh into it, which generates the gRPC code."""
    log = dependencies.parent / f"{key}.clone-{os.getpid()}.log"
    log.write_bytes(b"")
    with locked(dependencies.parent / "clones.lock"):
        if not stamped(key, dependencies):
            begun = time.monotonic()
            stamp_file().unlink(missing_ok=True)
            empty_venv(log)
            fill_venv(dependencies, log)
            stamp_file().write_text(stamp(key))
            say(f"  .venv made, gRPC code generated in {spent(begun)}")
    log.unlink()


def empty_venv(log: Path) -> None:
    """Makes .venv, unless it is there and of the Python that runs this; another one goes if it was made here."""
    here, there = os.path.realpath(sys.executable), os.path.realpath(VENV / "bin" / "python")
    if (VENV / "pyvenv.cfg").is_file() and here == there:
        return
    if os.path.lexists(VENV) and (VENV.is_symlink() or not is_file_with(VENV / MINE, f"{VENV}\n")):
        fail(f"{VENV} is not of this Python ({sys.executable}), and was not made here: move it away")
    run("making .venv", [sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)], log)
    (VENV / MINE).write_text(f"{VENV}\n")


def fill_venv(dependencies: Path, log: Path) -> None:
    """Links the dependencies into .venv, and installs kvmesh there."""
    packages = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    link = f"import site; site.addsitedir({str(dependencies / packages)!r})\n"
    (VENV / packages / "_kvmesh_dependencies.pth").write_text(link)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "-q"]
    editable = ["--no-deps", "--no-build-isolation", "--force-reinstall", "-e", str(REPO)]
    run("installing kvmesh", [*pip, *editable], log)


def is_file_with(path: Path, content: str) -> bool:
    """Whether `path` is a file of just that content."""
    try:
        return path.read_text() == content
    except OSError:
        return False


def stamp_file() -> Path:
    """Where the state is noted that .venv was made from."""
    return VENV / "kvmesh-stamp"


def stamp(key: str) -> str:
    """The state of all that the editable install depends on."""
    state = hashlib.blake2b(f"{VERSION} {key} {REPO}\n".encode())
    for path in [REPO / "pyproject.toml", REPO / "setup.py", *sorted((REPO / "protos").rglob("*.proto"))]:
        state.update(f"{path.relative_to(REPO)}\n".encode() + path.read_bytes())
    return state.hexdigest()


def stamped(key: str, dependencies: Path) -> bool:
    """Whether everything is there already."""
    try:
        same = stamp_file().read_text() == stamp(key)
    except FileNotFoundError:
        return False
    generated = list((REPO / "kvmesh" / "v1").glob("*_pb2.py"))
    return same and (dependencies / WHOLE).is_file() and bool(generated) and os.access(VENV / "bin" / "kvmesh", os.X_OK)


# Running and telling


def run(what: str, command: list[str], log: Path) -> None:
    """Runs a command with its output in `log`; says now and then how far it is. Ends the program when it fails."""
    begun = told = time.monotonic()
    with open(log, "ab") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        while True:
            try:
                code = process.wait(0.5)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() - told > REMINDER:
                    told = time.monotonic()
                    say(f"  {what}: {spent(begun)}, {last_line(log)[:90]}")
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if code:
        lines = log.read_text(errors="replace").splitlines()[-25:]
        print("\n".join(f"    {line}" for line in lines), file=sys.stderr)
        fail(f"{what} failed with status {code} after {spent(begun)}; the whole log: {log}{advice(lines)}")


def advice(lines: list[str]) -> str:
    """What to do about a failure that people meet."""
    text = "\n".join(lines)
    known = {
        "No space left on device": "The disk is full.",
        "Could not find a version": "pip does not see a package index that has it: look at `pip config list`.",
        "Failed to establish a new connection": "No network, or a proxy is needed (HTTPS_PROXY).",
        "CERTIFICATE_VERIFY_FAILED": "pip does not trust the index's certificate: see PIP_CERT.",
    }
    return "".join(f"\n  {what}" for sign, what in known.items() if sign in text)


def last_line(log: Path) -> str:
    """What pip said last about what it does."""
    doing = ("Building", "Collecting", "Downloading", "Installing", "Preparing", "Processing", "Running")
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip().startswith(doing)]
    return lines[-1] if lines else "beginning"


def spent(begun: float) -> str:
    """Time since `begun`, for people."""
    seconds = time.monotonic() - begun
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def say(text: str) -> None:
    """One line of progress."""
    print(text if text.startswith(" ") else f"setup: {text}", flush=True)


def fail(text: str) -> NoReturn:
    """Ends the program with a reason."""
    print(f"setup: {text}", file=sys.stderr)
    raise SystemExit(1)


if __name__ == "__main__":
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        fail("this Python has no venv module (Debian, Ubuntu: apt-get install python3-venv)")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        fail("interrupted; the next run goes on from the last finished step")
