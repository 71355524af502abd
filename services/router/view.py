"""The live mesh: a link to every registered engine, kept in step with the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping

from kvmesh.aio import Tasks
from kvmesh.errors import InvalidArgument, NotFound, Unavailable
from kvmesh.v1.engine_pb2 import ModelInfo
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from services.router.link import EngineLink

log = logging.getLogger(__name__)


class MeshView:
    """Engines by name. `update` takes the members as the registry knows them; links come and go with it.

    `make_link` makes a link of member, tasks and what it calls when it changes.
    """

    def __init__(
        self,
        on_model: Callable[[ModelInfo], object] = lambda model: None,
        make_link: Callable[[Member, Tasks, Callable[[], None]], EngineLink] = EngineLink,
    ) -> None:
        self.links: dict[str, EngineLink] = {}
        # Every model ever described here: one whose engines are all gone is unavailable, not unknown.
        self.models: dict[str, ModelInfo] = {}
        self._on_model = on_model
        self._make_link = make_link
        self._tasks = Tasks()
        self._changed = asyncio.Event()

    def update(self, members: Mapping[str, Member]) -> None:
        """Makes the links those of the engines in `members`; a new incarnation gets a new link."""
        engines = {m.endpoint.name: m for m in members.values() if m.kind == MEMBER_KIND_ENGINE}
        for name, link in list(self.links.items()):
            if name not in engines or engines[name].endpoint != link.member.endpoint:
                log.info("engine %s left", name)
                del self.links[name]
                link.retire()
        for name, member in engines.items():
            if name not in self.links:
                log.info("engine %s at %s", name, member.endpoint.address)
                self.links[name] = self._make_link(member, self._tasks, self._link_changed)

    def _link_changed(self) -> None:
        for link in self.links.values():
            if link.info is not None and self.models.get(link.info.model.name) != link.info.model:
                self.models[link.info.model.name] = link.info.model
                self._on_model(link.info.model)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    @property
    def connected(self) -> int:
        """Engines that are up."""
        return sum(link.connected for link in self.links.values())

    async def wait_connected(self, count: int) -> None:
        """Waits until `count` engines are up; the caller sets the deadline."""
        while self.connected < count:
            await self._changed.wait()

    def model(self, name: str) -> ModelInfo:
        """The model of that name; of no name, the only one served.

        Raises NotFound for an unknown model, InvalidArgument when a name is needed, Unavailable without any engine.
        """
        served = {link.info.model.name for link in self.links.values() if link.info is not None and link.connected}
        if not name:
            names = sorted(served or self.models)
            if len(names) > 1:
                raise InvalidArgument(f"model is empty, and several are served: {', '.join(names)}")
            if not names:
                raise Unavailable("no engine is connected")
            name = names[0]
        if name not in self.models:
            if not self.models:
                raise Unavailable("no engine is connected")
            raise NotFound(f"model = {name!r} is not served; there is: {', '.join(sorted(self.models))}")
        return self.models[name]

    def candidates(self, model: str, excluded: Collection[str] = ()) -> list[EngineLink]:
        """Links to the engines that can serve `model` now; those suspect or suspended only if there is no other."""
        up = [
            link
            for link in self.links.values()
            if link.connected and link.info is not None and link.info.model.name == model and link.name not in excluded
        ]
        return [link for link in up if not (link.suspect or link.suspended)] or up

    async def close(self) -> None:
        """Closes every link."""
        await self._tasks.close()
        await asyncio.gather(*(link.close() for link in self.links.values()))
        self.links.clear()
