"""MeshError and its way over the wire."""

from __future__ import annotations

import grpc
import pytest

from kvmesh import errors
from kvmesh.errors import Cancelled, InvalidArgument, MeshError, Unavailable, from_rpc

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MeshError)]


def failed(code: grpc.StatusCode, details: str | None) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=details)


def test_every_kind_has_a_status_of_its_own():
    codes = {kind("x").code for kind in KINDS}
    assert len(codes) == len(KINDS) == 15
    assert InvalidArgument("x").code is grpc.StatusCode.INVALID_ARGUMENT
    assert MeshError("x").code is grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind):
    error = kind("end = 9 is too much")
    back = from_rpc(failed(error.code, str(error)))
    assert type(back) is kind and str(back) == "end = 9 is too much"


def test_the_peer_begins_the_text():
    assert str(from_rpc(failed(grpc.StatusCode.UNAVAILABLE, "away"), "e0")) == "e0: away"
    assert isinstance(from_rpc(failed(grpc.StatusCode.CANCELLED, "x")), Cancelled)


@pytest.mark.parametrize("code", [grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.UNKNOWN])
def test_a_status_without_a_kind_is_a_plain_mesh_error(code):
    back = from_rpc(failed(code, "x"))
    assert type(back) is MeshError


@pytest.mark.parametrize("details", [None, ""])
def test_without_details_the_status_is_the_text(details):
    assert str(from_rpc(failed(grpc.StatusCode.UNAVAILABLE, details))) == "UNAVAILABLE"


async def test_of_a_real_call_that_finds_nobody():
    async with grpc.aio.insecure_channel("127.0.0.1:1") as ch:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ch.unary_unary("/x.Y/Z")(b"", timeout=5)
    error = from_rpc(caught.value, "nobody")
    assert isinstance(error, Unavailable) and str(error).startswith("nobody: ")
