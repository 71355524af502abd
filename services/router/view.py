"""The live mesh: a link to every registered engine, kept in step with the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial

from kvmesh.aio import Tasks
from kvmesh.errors import InvalidArgument, NotFound, Unavailable
from kvmesh.v1.engine_pb2 import ModelInfo
from kvmesh.v1.registry_pb2 import MEMBER_KIND_ENGINE, Member
from services.router.kvindex import BlockMap
from services.router.link import EngineLink
from services.router.meter import Paces
from services.router.roster import Journal, Roster
from services.router.storelink import StoreLinks

log = logging.getLogger(__name__)


class MeshView:
    """Engines by name. `update` takes the members as the registry knows them; links come and go with it.

    `make_link` makes a link of member, tasks and what it calls when it changes.
    """

    def __init__(
        self,
        on_model: Callable[[ModelInfo], object] = lambda model: None,
        make_link: Callable[[Member, Tasks, Callable[[], None]], EngineLink] = EngineLink,
        stores: StoreLinks | None = None,
    ) -> None:
        self.links: dict[str, EngineLink] = {}
        self.stores = StoreLinks() if stores is None else stores
        # Incarnations of the engines that are to get no new requests.
        self.draining: Collection[str] = ()
        # Every model ever described here: one whose engines are all gone is unavailable, not unknown.
        self.models: dict[str, ModelInfo] = {}
        self._on_model = on_model
        self._make_link = make_link
        self._tasks = Tasks()
        self._changed = asyncio.Event()
        self._journal = Journal()
        self._blocks = BlockMap()
        self._paces = Paces()
        # Engines that may be suspect or suspended.
        self._doubtful: set[str] = set()
        # Who is up changes seldom: until it does, the rosters stay. By model.
        self._rosters: dict[str, Roster] = {}

    def update(self, members: Mapping[str, Member]) -> None:
        """Makes the links those of the engines in `members`; a new incarnation gets a new link."""
        self.stores.update(members)
        engines = {m.endpoint.name: m for m in members.values() if m.kind == MEMBER_KIND_ENGINE}
        for name, link in list(self.links.items()):
            if name not in engines or engines[name].endpoint != link.member.endpoint:
                log.info("engine %s left", name)
                del self.links[name]
                link.retire()
        for name, member in engines.items():
            if name not in self.links:
                log.info("engine %s at %s", name, member.endpoint.address)
                self.links[name] = self._link(member)
        self._rosters.clear()

    def _link(self, member: Member) -> EngineLink:
        name = member.endpoint.name
        link = self._make_link(member, self._tasks, partial(self._link_changed, name))
        link.blocks = self._blocks
        link.meter.together = self._paces
        link.on_load = partial(self._journal.add, link)
        link.on_doubt = partial(self._doubtful.add, name)
        return link

    def _link_changed(self, name: str) -> None:
        self._rosters.clear()
        link = self.links.get(name)
        if link is not None and link.info is not None and self.models.get(link.info.model.name) != link.info.model:
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
        if not name:
            names = sorted(self._up() or self.models)
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

    def _up(self) -> dict[str, Roster]:
        """Who is up, by model."""
        if not self._rosters:
            up: dict[str, list[EngineLink]] = {}
            for link in self.links.values():
                if link.connected and link.info is not None:
                    up.setdefault(link.info.model.name, []).append(link)
            self._rosters = {model: Roster(links, self._journal) for model, links in up.items()}
        return self._rosters

    def candidates(self, model: str, excluded: Collection[str] = ()) -> Roster:
        """Links to the engines that can serve `model` now; those suspect or suspended only if there is no other."""
        roster = self._up().get(model)
        if roster is None:
            return Roster((), self._journal)
        draining = frozenset(self.draining)
        up = _without(roster, excluded, draining)
        sure = {n for n in self._doubtful if not ((k := self.links.get(n)) and (k.suspect or k.suspended))}
        self._doubtful.difference_update(sure)
        return _without(up, self._doubtful, frozenset()) or up

    async def close(self) -> None:
        """Closes every link."""
        await self.stores.close()
        await self._tasks.close()
        await asyncio.gather(*(link.close() for link in self.links.values()))
        self.links.clear()


def _without(roster: Roster, names: Collection[str], incarnations: Collection[str]) -> Roster:
    """Those of other names and incarnations; a roster that is kept for the next who asks."""
    if not names and not incarnations:
        return roster
    names, lives = frozenset(names), frozenset(incarnations)
    return roster.part(
        (names, lives),
        lambda: (k for k in roster if k.name not in names and k.member.endpoint.incarnation not in lives),
    )
