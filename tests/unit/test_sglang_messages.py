"""Messages between front and scheduler: over the wire and back, as SGLang encodes them."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from sglang_parts import _request, io_struct, m

from kvmesh.v1.common_pb2 import SamplingParams
from services.engine.base import Ending
from services.engine.sglang.frontend import SglangOptions, arguments
from services.engine.sglang.runtime import SglangRuntime, _ending

RAW = array("q", [1, 2**31, -1, 0]).tobytes()
VALUES = {int: 2**53 + 1, bool: True, str: "é", bytes: RAW, float: 0.1}
SLOTS = np.array([5, 6, 9], np.int64)


@pytest.fixture(autouse=True, scope="module")
def hooked():
    io_struct.hook_custom_types(*m.ALL)


def filled(kind):
    """A message of `kind` with something in each field."""
    values = {}
    for name, annotation in kind.__annotations__.items():
        if annotation in VALUES:
            values[name] = VALUES[annotation]
        elif annotation is io_struct.TokenizedGenerateReqInput:
            values[name] = _request("r", [1, 2, 3], SamplingParams(temperature=0), 5, 2)
        else:
            inner = annotation.__args__[0]
            values[name] = [VALUES[inner]] * 3
    return kind(rid="0" * 16, **values)


@pytest.mark.parametrize("kind", m.ALL, ids=lambda kind: kind.__name__)
def test_every_message_arrives_as_it_was_sent(kind):
    message = filled(kind)
    data = io_struct.msgpack_encode(message)
    back = io_struct.msgpack_decode(data)
    assert type(back) is kind and back.rid == message.rid
    # All of it: encoded again it is the same.
    assert io_struct.msgpack_encode(back) == data
    for name in kind.__annotations__:
        if name != "request":
            assert getattr(back, name) == getattr(message, name)


def test_they_are_told_from_sglangs_own():
    names = [kind.__name__ for kind in m.ALL]
    assert len(set(names)) == len(names)
    assert all(hasattr(m, name) for name in names)
    declared = {name for name in vars(m) if name.startswith("Mesh")}
    assert declared == set(names), "a message that nobody can decode"
    other = io_struct.msgpack_decode(io_struct.msgpack_encode(io_struct.AbortReq(rid="x")))
    assert type(other) is io_struct.AbortReq


def test_defaults_are_not_shared():
    one, two = m.MeshSent(rid="1"), m.MeshSent(rid="2")
    one.pieces.append(1)
    assert two.pieces == [] and m.MeshSent(rid="3").pieces == []


# What the front makes of SGLang's messages


@pytest.fixture
def runtime(tmp_path):
    made = SglangRuntime(SglangOptions(model="x"), "d" * 32, tmp_path, "t")
    sent: list = []
    made._frontend.send = sent.append
    made.sent = sent
    return made


def tokens(rid: str, ids: list[int], reason=None, cached: int = 0, logprobs=None, retractions=None):
    return SimpleNamespace(
        rids=[rid],
        output_ids=[array("q", ids)],
        finished_reasons=[reason],
        cached_tokens=[cached],
        output_token_logprobs_val=None if logprobs is None else [logprobs],
        retraction_counts=None if retractions is None else [retractions],
    )


def received(runtime, message, kind: str) -> None:
    runtime._received(type(kind, (), {})() if message is None else _as(kind, message))


def _as(kind: str, message):
    made = type(kind, (), {})()
    made.__dict__.update(vars(message))
    return made


async def test_tokens_reach_their_stream(runtime):
    stream = runtime.generate([1, 2, 3], SamplingParams(), 5, None)
    (request,) = runtime.sent
    received(runtime, SimpleNamespace(rids=[request.rid, "gone"], at=123), "MeshBegan")
    received(runtime, tokens("gone", [9]), "BatchTokenIDOutput")
    received(runtime, tokens(request.rid, [7, 8], cached=2, logprobs=[-0.5, -1.0]), "BatchTokenIDOutput")
    received(runtime, tokens(request.rid, []), "BatchTokenIDOutput")
    last = tokens(request.rid, [9], {"type": "length", "length": 3}, cached=2, retractions=1)
    received(runtime, last, "BatchTokenIDOutput")
    outputs = [await anext(stream) for _ in range(3)]
    assert [list(o.token_ids) for o in outputs] == [[7, 8], [9], []]
    assert list(outputs[0].logprobs) == [-0.5, -1.0] and outputs[2].ending == Ending("length", retractions=1)
    assert (stream.began_ns, stream.cached_tokens) == (123, 2) and not runtime._streams
    # It has ended: closing it aborts nothing.
    stream.close()
    assert len(runtime.sent) == 1


async def test_a_stream_that_is_closed_is_aborted_once(runtime):
    stream = runtime.generate([1, 2, 3], SamplingParams(), 5, 4)
    (message,) = runtime.sent
    assert type(message) is m.MeshGenerate and message.ticket == 4 and message.request.rid == message.rid
    stream.close()
    stream.close()
    assert [type(s) for s in runtime.sent[1:]] == [io_struct.AbortReq] and runtime.sent[1].rid == message.rid
    received(runtime, tokens(message.rid, [1]), "BatchTokenIDOutput")
    received(runtime, SimpleNamespace(rid=message.rid, finished_reason=None, abort_message="x"), "AbortReq")


async def test_an_abort_by_sglang_ends_the_stream(runtime):
    stream = runtime.generate([1], SamplingParams(), 5, None)
    rid = runtime.sent[0].rid
    reason = {"type": "abort", "message": "The request queue is full."}
    received(runtime, SimpleNamespace(rid=rid, finished_reason=reason, abort_message=None), "AbortReq")
    assert (await anext(stream)).ending == Ending("failed", message="The request queue is full.")


async def test_a_reservation_that_nobody_waits_for_is_freed(runtime):
    received(runtime, SimpleNamespace(rid="9", error="", ticket=12), "MeshReserved")
    received(runtime, SimpleNamespace(rid="9", error="no room", ticket=0), "MeshReserved")
    (free,) = runtime.sent
    assert type(free) is m.MeshFree and free.ticket == 12


async def test_ids_are_of_one_length(runtime):
    """SGLang aborts every request whose id begins with the one given."""
    ids = [runtime._id() for _ in range(1000)]
    assert len(set(ids)) == 1000 and {len(i) for i in ids} == {16}


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        ({"type": "stop", "matched": 5}, Ending("stop", 5)),
        ({"type": "stop", "matched": 0}, Ending("stop", 0)),
        ({"type": "stop", "matched": "text"}, Ending("stop")),
        ({"type": "length", "length": 3}, Ending("length")),
        ({"type": "abort", "message": "Out of memory"}, Ending("failed", message="Out of memory")),
        (
            {"type": "abort", "message": "Failed to compile", "status_code": 400},
            Ending("failed", message="Failed to compile", refused=True),
        ),
        ({"type": "abort", "message": "busy", "status_code": 503}, Ending("failed", message="busy")),
        ({"type": "abort"}, Ending("failed", message="the request was aborted")),
    ],
)
def test_endings(reason, ending):
    assert _ending(reason, 0) == ending


def test_sampling_parameters_of_a_request():
    given = SamplingParams(
        temperature=0.5, top_k=7, min_p=0.25, stop_token_ids=[3, 4], ignore_eos=True, seed=9, logprobs=True
    )
    request = _request("r", [1, 2], given, 17, 0)
    params = request.sampling_params
    assert (params.max_new_tokens, params.temperature, params.top_k, params.min_p) == (17, 0.5, 7, 0.25)
    assert (params.stop_token_ids, params.ignore_eos, params.sampling_seed) == ({3, 4}, True, 9)
    assert request.return_logprob and list(request.input_ids) == [1, 2] and request.stream
    plain = _request("r", [1], SamplingParams(), 1, 0)
    assert (plain.sampling_params.temperature, plain.sampling_params.top_p) == (1.0, 1.0)
    assert not plain.return_logprob and not plain.sampling_params.stop_token_ids
    seeds = {_request("r", [1], SamplingParams(), 1, 0).sampling_params.sampling_seed for _ in range(20)}
    assert len(seeds) > 15 and all(0 <= s < 2**31 for s in seeds)
    # The end of the sequence is part of a form.
    bound = _request("r", [1, 2], SamplingParams(regex="a+", ignore_eos=True), 1, 1).sampling_params
    assert (bound.regex, bound.json_schema, bound.ebnf, bound.ignore_eos) == ("a+", None, None, False)
    assert bound.custom_params == {"kvmesh_generated": 1} and plain.sampling_params.custom_params is None
    # Greedy: the best one only.
    assert _request("r", [1], SamplingParams(temperature=0), 1, 0).sampling_params.top_k == 1
    assert _request("r", [1], SamplingParams(seed=0), 1, 0).sampling_params.sampling_seed == 0


@pytest.mark.parametrize("cuda", [False, True])
def test_arguments_for_sglang(cuda):
    options = SglangOptions("m", "bfloat16", kv_tokens=100, page_size=16, chunk_tokens=64, max_running=3)
    given = arguments(options, cuda)
    assert (given["model_path"], given["dtype"], given["page_size"]) == ("m", "bfloat16", 16)
    assert (given["max_total_tokens"], given["chunked_prefill_size"], given["max_running_requests"]) == (100, 64, 3)
    assert ("attention_backend" in given) is (not cuda) and given["disable_overlap_schedule"]
    # Nothing said: SGLang's own; what is said as `extra` comes last.
    bare = arguments(SglangOptions("m", extra={"page_size": 4, "sleep_on_idle": False}), cuda)
    assert not {"max_total_tokens", "chunked_prefill_size", "max_running_requests"} & set(bare)
    assert bare["page_size"] == 4 and bare["sleep_on_idle"] is False
