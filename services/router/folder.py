"""A folder of strategies, one or more a file, taken in again whenever a file changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvmesh.aio import Tasks
from kvmesh.errors import InvalidArgument, MeshError
from kvmesh.strategy import Strategy
from kvmesh.v1 import router_pb2 as pb
from services.router.rehearsal import rehearse_source
from services.router.strategy_file import Loaded, Loader, complaint

log = logging.getLogger(__name__)

PERIOD_S = 1.0
MOST_BYTES = 1 << 20

Stamp = tuple[int, int, int]
Adopt = Callable[[Mapping[str, Strategy]], None]


@dataclass
class _File:
    """What is known of one file. `loaded` is the newest version that is good, `error` what is wrong with the newest."""

    stamp: Stamp
    loaded: Loaded | None = None
    error: str = ""


@dataclass
class StrategyFolder:
    """The strategies of the *.py files in the folder `given`, names that begin with _ or . aside, and those `built_in`.

    A file that cannot be loaded, or fails its dry run, leaves its old version in use. Raises InvalidArgument when there
    is no such folder.
    """

    given: str
    built_in: Mapping[str, Strategy]
    _files: dict[str, _File] = field(default_factory=dict)
    _adopt: Adopt = lambda strategies: None
    _loader: Loader = field(default_factory=Loader)
    _tasks: Tasks = field(default_factory=Tasks)

    def __post_init__(self) -> None:
        self.folder = Path(self.given).expanduser().resolve()
        if not self.folder.is_dir():
            raise InvalidArgument(f"strategy_dir = {self.given!r} is not a folder")

    @property
    def strategies(self) -> dict[str, Strategy]:
        """All that are in use, by name."""
        found = dict(self.built_in)
        for file in self._files.values():
            if file.loaded is not None:
                found.update(file.loaded.strategies)
        return found

    def follow(self, adopt: Adopt) -> None:
        """Looks for changes from now on. `adopt` is given all strategies; when it raises, the change is refused."""
        self._adopt = adopt
        self._tasks.start(self._follow(), "follow the strategy folder")

    async def close(self) -> None:
        """Stops looking, and lets go of the files."""
        await self._tasks.close()
        for file in self._files.values():
            if file.loaded is not None:
                file.loaded.drop()

    async def scan(self) -> None:
        """Takes in what has changed since the last time."""
        found = await asyncio.to_thread(_look, self.folder)
        for name in [name for name in self._files if name not in found]:
            log.info("strategy file %s is gone", name)
            file = self._files.pop(name)
            self._adopt(self.strategies)
            if file.loaded is not None:
                file.loaded.drop()
        for name, stamp in found.items():
            file = self._files.setdefault(name, _File((0, 0, 0)))
            if file.stamp != stamp:
                file.stamp = stamp
                file.error = await self._take(self.folder / name, file)
                if file.error:
                    log.error("strategy file %s is not taken: %s", name, file.error)

    async def _take(self, path: Path, file: _File) -> str:
        try:
            source = await asyncio.to_thread(_read, path)
        except (OSError, ValueError) as error:
            return str(error)
        if wrong := await rehearse_source(path, source):
            return wrong
        try:
            loaded = self._loader.load(path, source)
        except Exception as error:
            return complaint(error, path)
        before, file.loaded = file.loaded, None
        taken = sorted(set(loaded.strategies) & set(self.strategies))
        try:
            if taken:
                raise InvalidArgument(f"there is another strategy {taken[0]}")
            file.loaded = loaded
            self._adopt(self.strategies)
        except MeshError as error:
            loaded.drop()
            file.loaded = before
            return str(error)
        if before is not None:
            before.drop()
        log.info("strategy file %s: %s", path.name, ", ".join(sorted(loaded.strategies)))
        return ""

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            try:
                await self.scan()
            except (OSError, MeshError) as error:
                log.error("strategy folder %s: %s", self.folder, error)

    def annotate(self, infos: list[pb.StrategyInfo]) -> list[pb.StrategyInfo]:
        """`infos` with file and error where they are from files, and those files that are no good at all."""
        sources = {
            name: (file, stem)
            for stem, file in self._files.items()
            for name in (file.loaded.strategies if file.loaded is not None else ())
        }
        for info in infos:
            if info.name in sources:
                file, info.file = sources[info.name]
                info.error = file.error
            elif info.name not in self.built_in:
                info.error = "its file is gone; it stays while it is in force"
        bad = [
            pb.StrategyInfo(name=Path(name).stem, file=name, error=file.error)
            for name, file in self._files.items()
            if file.loaded is None and file.error
        ]
        return sorted([*infos, *bad], key=lambda info: info.name)


def _look(folder: Path) -> dict[str, Stamp]:
    found: dict[str, Stamp] = {}
    for path in sorted(folder.glob("*.py")):
        if path.name[0] not in "_." and path.is_file():
            now = path.stat()
            found[path.name] = (now.st_mtime_ns, now.st_size, now.st_ino)
    return found


def _read(path: Path) -> bytes:
    source = path.read_bytes()
    if len(source) > MOST_BYTES:
        raise ValueError(f"{len(source)} bytes are more than {MOST_BYTES}")
    return source
