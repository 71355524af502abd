"""NEVER RUN: there was no GPU where this was written. Inter-process memory handles, straight from the CUDA driver.

torch's own sharing counts references in shared files for every receiver; a pool that many peers map, and close when its
owner dies, needs the plain calls.
"""

from __future__ import annotations

import ctypes
from typing import Protocol

HANDLE_BYTES = 64
# CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
LAZY_PEER_ACCESS = 1
# CU_MEMHOSTREGISTER_PORTABLE, CU_MEMHOSTREGISTER_DEVICEMAP
FOR_ALL_DEVICES, INTO_THEIR_ADDRESSES = 1, 2


class CudaError(OSError):
    """A call of the driver failed."""


class IpcMemory(Protocol):
    """What cuda_ipc needs of a driver. All raise CudaError."""

    def allocation(self, address: int) -> tuple[int, int]:
        """(base, bytes) of the allocation that has this address."""

    def export(self, address: int) -> bytes:
        """A handle for the allocation that has this address."""

    def open(self, handle: bytes) -> int:
        """Maps another process's allocation; where its base is here."""

    def close(self, base: int) -> None:
        """Unmaps what `open` gave."""

    def pin(self, address: int, size: int) -> None:
        """Keeps memory of this process where it is: kernels of all devices reach it at the address that it has here."""

    def unpin(self, address: int) -> None:
        """Ends that."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaDriver:
    """libcuda. The calling thread must have used torch.cuda before: so it has a context."""

    def __init__(self) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise CudaError(f"the CUDA driver is not there: {error}") from error

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(code, ctypes.byref(text))
            raise CudaError(f"{name}: {(text.value or b'error').decode()} ({code})")

    def allocation(self, address: int) -> tuple[int, int]:
        """As the protocol says."""
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address))
        return base.value, size.value

    def export(self, address: int) -> bytes:
        """As the protocol says. Memory of expandable segments has no such handle."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        """As the protocol says."""
        if len(handle) != HANDLE_BYTES:
            raise CudaError(f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}")
        base = ctypes.c_uint64()
        self._call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(base),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(LAZY_PEER_ACCESS),
        )
        return base.value

    def close(self, base: int) -> None:
        """As the protocol says."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(base))

    def pin(self, address: int, size: int) -> None:
        """As the protocol says. Raises CudaError also where devices have other addresses than the host."""
        flags = ctypes.c_uint(FOR_ALL_DEVICES | INTO_THEIR_ADDRESSES)
        self._call("cuMemHostRegister_v2", ctypes.c_void_p(address), ctypes.c_size_t(size), flags)
        there = ctypes.c_uint64()
        try:
            self._call("cuMemHostGetDevicePointer_v2", ctypes.byref(there), ctypes.c_void_p(address), ctypes.c_uint(0))
            if there.value != address:
                raise CudaError("the device reaches the host's memory at other addresses")
        except CudaError:
            self.unpin(address)
            raise

    def unpin(self, address: int) -> None:
        """As the protocol says."""
        self._call("cuMemHostUnregister", ctypes.c_void_p(address))
