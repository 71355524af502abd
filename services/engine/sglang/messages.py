"""What the engine's front and SGLang's scheduler say to each other beside SGLang's own messages.

Token ids and slots travel as the bytes of int64 arrays; times are of the monotonic clock, which all processes of a
machine share, in nanoseconds.
"""

# SGLang decodes these by their annotations at run time: no postponed evaluation here.
from sglang.srt.managers.io_struct import BaseReq, TokenizedGenerateReqInput


class MeshReserve(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Reserve slots for ids[matched:end); answered by MeshReserved. Waits for room until cancelled."""

    ids: bytes
    end: int
    wait: bool


class MeshReserved(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """`error` empty: reserved as `ticket`."""

    ticket: int = 0
    matched: int = 0
    slots: bytes = b""
    error: str = ""


class MeshCancelReserve(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Stop waiting; answered by MeshReserved of that rid, whichever way it went."""


class MeshPublish(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """The ticket's slots up to token `upto` hold KV now: put them into the prefix cache. Answered by MeshDone."""

    ticket: int
    upto: int


class MeshFree(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Give back what the ticket still holds. Answered by MeshDone."""

    ticket: int


class MeshGenerate(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Use the ticket up for this request."""

    ticket: int
    request: TokenizedGenerateReqInput


class MeshSend(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Have the KV of ids[begin:end) and write it to `slots` of the pool `peer` (a KvPool). Answered by MeshSent."""

    ids: bytes
    begin: int
    end: int
    transport: str
    peer: bytes
    slots: bytes
    checksum: bool = False


class MeshSent(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Over: nothing is being written any more. `pieces`: begin, end, tokens, bytes of each copy, one after another."""

    cached: int = 0
    computed: int = 0
    began: int = 0
    prefilled: int = 0
    pieces: list[int] = []  # noqa: RUF012 (msgspec copies it)
    # Of each copy, if they were asked for.
    sums: list[int] = []  # noqa: RUF012
    error: str = ""
    aborted: bool = False
    # The way to the peer could not be set up.
    unconnected: bool = False


class MeshCancelSend(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Stop sending; answered by MeshSent."""


class MeshAccept(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Take what a peer writes at `meeting` (a Meeting) into `slots`. Answered by MeshDone when all has arrived."""

    transport: str
    meeting: bytes
    slots: bytes
    seconds: float


class MeshCancelAccept(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Stop taking; MeshDone of that rid follows, and nothing is written any more then."""


class MeshVerify(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Compare the KV in `slots` with the checksums of `tokens` rows each. Answered by MeshDone."""

    slots: bytes
    tokens: list[int]
    sums: list[int]


class MeshForgetPeer(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Close the way into this pool (a KvPool), once nothing uses it."""

    peer: bytes


class MeshFlush(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Empty the prefix cache. Answered by MeshDone."""


class MeshDone(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Done, unless `error` says why not."""

    error: str = ""


class MeshHottest(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Which contexts were used last? Answered by MeshContexts."""

    count: int


class MeshContexts(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """The one used last first; `idle` in seconds."""

    ids: list[bytes] = []  # noqa: RUF012 (msgspec copies it)
    idle: list[float] = []  # noqa: RUF012


class MeshWatchCache(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """From now on tell of cache changes, beginning with all there is."""


class MeshCacheChange(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """Hashes of blocks, as uint64 arrays."""

    snapshot: bool
    stored: bytes
    removed: bytes


class MeshBegan(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """These requests were given to the model for the first time at `at`."""

    rids: list[str]
    at: int


class MeshLoad(BaseReq, kw_only=True):  # type: ignore[misc, call-arg]
    """The scheduler at one moment; slots in tokens."""

    running: int
    waiting: int
    waiting_reservations: int
    waiting_tokens: int
    sending: int
    free: int
    cached: int
    in_use: int
    reserved: int


ALL = (
    MeshReserve,
    MeshReserved,
    MeshCancelReserve,
    MeshPublish,
    MeshFree,
    MeshGenerate,
    MeshSend,
    MeshSent,
    MeshCancelSend,
    MeshAccept,
    MeshCancelAccept,
    MeshVerify,
    MeshForgetPeer,
    MeshFlush,
    MeshDone,
    MeshHottest,
    MeshContexts,
    MeshWatchCache,
    MeshCacheChange,
    MeshBegan,
    MeshLoad,
)
