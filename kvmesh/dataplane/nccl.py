"""NEVER RUN on a GPU: there was none where this was written.

Links over NCCL: a communicator of two, made with plain calls of libnccl, not through torch's process group, whose
watchdog ends the whole process when an operation hangs. Every call is non-blocking and looked at until its deadline;
then the communicator is aborted, and only the transfer fails. NCCL's own settings (NCCL_SOCKET_IFNAME, NCCL_IB_HCA,
NCCL_NSOCKS_PERTHREAD and so on) are those of the process's environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from kvmesh.dataplane.base import CannotConnect
from kvmesh.dataplane.link import RECEIVER, Link, Links, Pending
from kvmesh.errors import Unavailable

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

log = logging.getLogger(__name__)

SUCCESS, IN_PROGRESS = 0, 7
UINT8 = 1
ID_BYTES = 128
HEADER_NUMBERS = 3
_MAGIC, _UNSET = 0xCAFEBEEF, -(2**31)
# The newest version whose settings these are; later libraries take later ones for unset.
_CONFIG_VERSION = 21800
# Between two looks at something under way.
LOOK_S = 0.0002


class _Id(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * ID_BYTES),)


class _Config(ctypes.Structure):
    """ncclConfig_t, as of 2.18."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cgaClusterSize", ctypes.c_int),
        ("minCTAs", ctypes.c_int),
        ("maxCTAs", ctypes.c_int),
        ("netName", ctypes.c_char_p),
        ("splitShare", ctypes.c_int),
    )


def config() -> _Config:
    """A communicator whose calls do not block."""
    size = ctypes.sizeof(_Config)
    return _Config(size, _MAGIC, _CONFIG_VERSION, 0, _UNSET, _UNSET, _UNSET, None, _UNSET)


class NcclApi(Protocol):
    """What is needed of libnccl. Codes are ncclResult_t; `comm` and `stream` are addresses."""

    def unique_id(self) -> bytes:
        """For both sides of one communicator. Raises Unavailable."""

    def init(self, unique: bytes, rank: int) -> tuple[int, int]:
        """(code, comm) of a communicator of two, which is not ready yet."""

    def state(self, comm: int) -> int:
        """SUCCESS, IN_PROGRESS, or what went wrong."""

    def send(self, address: int, count: int, peer: int, comm: int, stream: int) -> int:
        """Puts a send of bytes on the stream."""

    def recv(self, address: int, count: int, peer: int, comm: int, stream: int) -> int:
        """Puts a receive of bytes on the stream."""

    def abort(self, comm: int) -> None:
        """Ends it and all that is under way on it."""

    def text(self, code: int) -> str:
        """A code in words."""


class LibNccl:
    """libnccl, as torch has loaded it."""

    def __init__(self) -> None:
        import torch  # noqa: F401

        try:
            lib = ctypes.CDLL("libnccl.so.2")
        except OSError as error:
            raise CannotConnect(f"NCCL is not there: {error}") from error
        lib.ncclGetErrorString.restype = ctypes.c_char_p
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        lib.ncclCommInitRankConfig.argtypes = [
            ctypes.POINTER(pointer), ctypes.c_int, _Id, ctypes.c_int, ctypes.POINTER(_Config)
        ]  # fmt: skip
        for name in ("ncclSend", "ncclRecv"):
            getattr(lib, name).argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, pointer, pointer]
        lib.ncclCommAbort.argtypes = [pointer]
        lib.ncclCommGetAsyncError.argtypes = [pointer, ctypes.POINTER(ctypes.c_int)]
        self._lib = lib

    def unique_id(self) -> bytes:
        """As the protocol says."""
        made = _Id()
        if code := self._lib.ncclGetUniqueId(ctypes.byref(made)):
            raise Unavailable(f"ncclGetUniqueId: {self.text(code)}")
        return bytes(made)

    def init(self, unique: bytes, rank: int) -> tuple[int, int]:
        """As the protocol says."""
        comm, settings = ctypes.c_void_p(), config()
        made = _Id.from_buffer_copy(unique)
        code = self._lib.ncclCommInitRankConfig(ctypes.byref(comm), 2, made, rank, ctypes.byref(settings))
        return int(code), comm.value or 0

    def state(self, comm: int) -> int:
        """As the protocol says."""
        state = ctypes.c_int()
        return int(self._lib.ncclCommGetAsyncError(comm, ctypes.byref(state))) or state.value

    def send(self, address: int, count: int, peer: int, comm: int, stream: int) -> int:
        """As the protocol says."""
        return int(self._lib.ncclSend(address, count, UINT8, peer, comm, stream))

    def recv(self, address: int, count: int, peer: int, comm: int, stream: int) -> int:
        """As the protocol says."""
        return int(self._lib.ncclRecv(address, count, UINT8, peer, comm, stream))

    def abort(self, comm: int) -> None:
        """As the protocol says."""
        self._lib.ncclCommAbort(comm)

    def text(self, code: int) -> str:
        """As the protocol says."""
        return str(self._lib.ncclGetErrorString(code).decode())


class Device(Protocol):
    """What is needed of a GPU by one link: a stream of its own."""

    stream: int

    def use(self) -> contextlib.AbstractContextManager[None]:
        """Launches of this thread go to the stream."""

    def mark(self) -> Callable[[], bool]:
        """Tells, when called, whether all that is on the stream now has run."""

    def wait_for(self, fence: object) -> None:
        """What is launched from now on runs after the fence (kvmesh.dataplane.cuda_ipc.CudaStream.fence)."""

    def header(self, numbers: list[int]) -> torch.Tensor:
        """On the device."""

    def bring(self, header: torch.Tensor) -> torch.Tensor:
        """A copy in the host's memory, which is there once the stream has got so far."""


class TorchDevice:
    """A stream of torch's."""

    def __init__(self, device: torch.device | str) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device=device)
        self.stream = int(self._stream.cuda_stream)

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        """As the protocol says."""
        import torch

        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Callable[[], bool]:
        """As the protocol says."""
        import torch

        event = torch.cuda.Event()
        event.record(self._stream)
        return lambda: bool(event.query())

    def wait_for(self, fence: object) -> None:
        """As the protocol says."""
        self._stream.wait_event(fence)

    def header(self, numbers: list[int]) -> torch.Tensor:
        """As the protocol says."""
        import torch

        with self.use():
            return torch.tensor(numbers, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)

    def bring(self, header: torch.Tensor) -> torch.Tensor:
        """As the protocol says."""
        import torch

        host = torch.empty(header.shape, dtype=header.dtype, pin_memory=True)
        with self.use():
            host.copy_(header, non_blocking=True)
        return host


class NcclLinks(Links):
    """Communicators of `device`."""

    name = "nccl"

    def __init__(self, device: torch.device | str, api: NcclApi | None = None, make: Any = None) -> None:
        self._api = api or LibNccl()
        self._make: Callable[[], Device] = make or (lambda: TorchDevice(device))

    def join(self, store: Store, rank: int, seconds: float) -> NcclLink:
        """A communicator of two. The receiver draws its number."""
        deadline = time.monotonic() + seconds
        if rank == RECEIVER:
            unique = self._api.unique_id()
            store.set("nccl", unique)
        else:
            unique = bytes(store.get("nccl"))
        device = self._make()
        with device.use():
            code, comm = self._api.init(unique, rank)
        if code not in (SUCCESS, IN_PROGRESS):
            raise Unavailable(f"ncclCommInitRankConfig: {self._api.text(code)}")
        link = NcclLink(self._api, comm, 1 - rank, device)
        link.ready(deadline)
        return link


class NcclPending(Pending):
    """What is on the link's stream up to some point."""

    def __init__(self, link: NcclLink, over: Callable[[], bool], keep: object) -> None:
        self._link = link
        self._over = over
        # Memory that the operation uses.
        self._keep = keep

    def wait(self, deadline: float) -> None:
        """Looks again and again; aborts the communicator at the deadline, and when it has failed."""
        while not self._over():
            self._link.check(deadline)
            time.sleep(LOOK_S)
        self._keep = None


class NcclLink(Link):
    """One communicator and one stream."""

    def __init__(self, api: NcclApi, comm: int, peer: int, device: Device) -> None:
        self._api = api
        self._comm = comm
        self._peer = peer
        self._device = device
        self._lock = threading.Lock()
        self._aborted = False

    def ready(self, deadline: float) -> None:
        """Waits until the communicator has nothing under way on the host's side."""
        while self.check(deadline) == IN_PROGRESS:
            time.sleep(LOOK_S)

    def check(self, deadline: float) -> int:
        """The communicator's state. Raises Unavailable, and aborts it, when it has failed or time is up."""
        with self._lock:
            if self._aborted:
                raise Unavailable("the connection was aborted")
            state = self._api.state(self._comm)
        if state not in (SUCCESS, IN_PROGRESS):
            self.abort()
            raise Unavailable(f"NCCL: {self._api.text(state)}")
        if time.monotonic() > deadline:
            self.abort()
            raise Unavailable("NCCL: timed out")
        return state

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Copies of this thread go to our stream."""
        with self._device.use():
            yield

    def wait_for(self, fence: object) -> None:
        """What is sent from now on is read after the fence."""
        self._device.wait_for(fence)

    def settle(self, deadline: float) -> None:
        """Waits until what was launched on our stream has run."""
        NcclPending(self, self._device.mark(), None).wait(deadline)

    def send_header(self, header: list[int]) -> NcclPending:
        """From the device's memory: NCCL knows no other."""
        data = self._device.header(header)
        return self._launch(self._api.send, data)

    def recv_header(self) -> tuple[NcclPending, torch.Tensor]:
        """Into the device's memory, and from there into the host's."""
        data = self._device.header([0] * HEADER_NUMBERS)
        self._launch(self._api.recv, data)
        host = self._device.bring(data)
        return NcclPending(self, self._device.mark(), (data, host)), host

    def send(self, data: torch.Tensor) -> NcclPending:
        """As the base says."""
        return self._launch(self._api.send, data)

    def recv(self, data: torch.Tensor) -> NcclPending:
        """As the base says."""
        return self._launch(self._api.recv, data)

    def _launch(self, call: Callable[[int, int, int, int, int], int], data: torch.Tensor) -> NcclPending:
        with self._lock:
            if self._aborted:
                raise Unavailable("the connection was aborted")
            size = data.numel() * data.element_size()
            code = call(data.data_ptr(), size, self._peer, self._comm, self._device.stream)
        if code not in (SUCCESS, IN_PROGRESS):
            self.abort()
            raise Unavailable(f"NCCL: {self._api.text(code)}")
        # The launch itself may be under way: an event before its end would say nothing.
        self.ready(time.monotonic() + 10.0)
        return NcclPending(self, self._device.mark(), data)

    def abort(self) -> None:
        """ncclCommAbort, once."""
        with self._lock:
            if self._aborted:
                return
            self._aborted = True
            self._api.abort(self._comm)
