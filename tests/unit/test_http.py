"""The HTTP door, by the official client and by hand, over fake engines."""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from fake_engine import answer
from kvmesh_http import TEXT

from kvmesh.errors import FailedPrecondition, ResourceExhausted, Unavailable
from kvmesh.v1 import router_pb2 as pb
from services.router.door import Door

PROMPT = list(TEXT.encode())


def text_of(tokens: list[int]) -> str:
    return bytes(tokens).decode()


async def test_models(door):
    (model,) = (await door.openai.models.list()).data
    assert model.id == "fake" and model.owned_by == "kvmesh"


async def test_completion(door):
    reply = await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=8, temperature=0)
    assert reply.choices[0].text == text_of(answer(PROMPT, 8))
    assert reply.choices[0].finish_reason == "length" and reply.object == "text_completion" and reply.model == "fake"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(PROMPT), 8)


async def test_completion_streams(door):
    stream = await door.openai.completions.create(
        model="fake", prompt=PROMPT, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks if c.choices) == text_of(answer(PROMPT, 8))
    assert len([c for c in chunks if c.choices and c.choices[0].text]) == 8
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


async def test_several_prompts_and_choices(door):
    reply = await door.openai.completions.create(model="fake", prompt=["ab", "cd"], n=2, max_tokens=3)
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    expected = [text_of(answer(list(p), 3)) for p in (b"ab", b"ab", b"cd", b"cd")]
    assert [c.text for c in reply.choices] == expected
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (4, 12)


async def test_chat(door):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    reply = await door.openai.chat.completions.create(model="fake", messages=messages, max_completion_tokens=5)
    call = (door.mesh.engines[0].requests("StartGenerate") or door.mesh.engines[1].requests("StartGenerate"))[0]
    prompt = list(call.token_ids)
    assert bytes(prompt).decode() == "system: Be brief.\nuser: Hello\nassistant: "
    assert reply.choices[0].message.content == text_of(answer(prompt, 5)) and reply.object == "chat.completion"
    stream = await door.openai.chat.completions.create(model="fake", messages=messages, max_tokens=5, stream=True)
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].object == "chat.completion.chunk"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == reply.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


async def test_logprobs(door):
    reply = await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=3, logprobs=1)
    assert reply.choices[0].logprobs.token_logprobs == [-0.5] * 3
    assert "".join(reply.choices[0].logprobs.tokens) == reply.choices[0].text
    messages = [{"role": "user", "content": "x"}]
    chat = await door.openai.chat.completions.create(model="fake", messages=messages, max_tokens=3, logprobs=True)
    assert [t.logprob for t in chat.choices[0].logprobs.content] == [-0.5] * 3


async def test_stop_string_ends_the_answer(door):
    whole = text_of(answer(PROMPT, 12))
    reply = await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=12, stop=[whole[4:6]])
    assert reply.choices[0].text == whole[: whole.index(whole[4:6])] and reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("asked", "field", "form"),
    [
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "string"}}}},
            "json_schema",
            '{"type": "string"}',
        ),
        ({"json_schema": {"type": "string"}}, "json_schema", '{"type": "string"}'),
        ({"json_schema": "true"}, "json_schema", "true"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"ebnf": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"response_format": {"type": "text"}}, None, None),
    ],
)
async def test_the_form_of_an_answer(door, asked, field, form):
    reply = await door.http.post("/v1/completions", json={"model": "fake", "prompt": TEXT, "max_tokens": 2, **asked})
    assert reply.status_code == 200, reply.text
    engine = next(e for e in door.mesh.engines if e.calls)
    sampling = engine.requests("StartGenerate")[0].sampling
    assert sampling.WhichOneof("form") == field
    if field is not None:
        assert getattr(sampling, field) == form


async def test_strategy_by_body_and_by_header(door):
    extra = {"strategy": "balanced_prefill_decode", "strategy_params": {"ratio": 0.5}}
    await door.openai.completions.create(model="fake", prompt=TEXT * 4, max_tokens=2, extra_body=extra)
    (send,) = door.mesh.engines[0].requests("RemoteSend")
    assert (send.begin, send.end) == (0, 32)
    headers = {"x-kvmesh-strategy": "prefill_decode"}
    await door.openai.completions.create(model="fake", prompt="z" * 50, max_tokens=2, extra_headers=headers)
    assert door.mesh.engines[0].requests("RemoteSend")[1].end == 49


async def test_session_tenant_and_priority_by_body_and_by_header(door, monkeypatch):
    seen = []
    generate = Door.generate

    async def noted(self, request, *rest):
        seen.append((request.session, request.tenant, pb.Priority.Name(request.priority)))
        await generate(self, request, *rest)

    monkeypatch.setattr(Door, "generate", noted)
    extra = {"session": "s-1", "tenant": "t-1", "priority": "high"}
    await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=2, extra_body=extra)
    headers = {"x-kvmesh-session": "s-2", "x-kvmesh-priority": "LOW"}
    await door.openai.chat.completions.create(
        model="fake",
        messages=[{"role": "user", "content": "hi"}],
        max_tokens=2,
        extra_body=extra,
        extra_headers=headers,
    )
    await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=2)
    assert seen == [
        ("s-1", "t-1", "PRIORITY_HIGH"),
        ("s-2", "t-1", "PRIORITY_LOW"),
        ("", "", "PRIORITY_UNSPECIFIED"),
    ]


async def test_request_id_and_trace_are_taken_and_given_back(door):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"model": "fake", "prompt": TEXT, "max_tokens": 2}
    reply = await door.http.post("/v1/completions", json=body, headers={"x-request-id": "mine", "traceparent": trace})
    assert reply.headers["x-request-id"] == "mine" and reply.json()["id"] == "cmpl-mine"
    assert reply.headers["traceparent"].split("-")[1] == trace.split("-")[1]
    engine = next(e for e in door.mesh.engines if e.calls)
    assert engine.requests("StartGenerate")[0].request_id == "mine"


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "other"}, 404, "'other'"),
        ({"strategy": "none"}, 404, "'none'"),
        ({"strategy": "balanced_prefill_decode", "strategy_params": {"ratio": 2}}, 400, "ratio"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_new_tokens = 0"),
        ({"max_tokens": -5}, 400, "max_new_tokens = -5"),
        ({"n": 0}, 400, "n = 0"),
        ({"n": 1000}, 400, "n = 1000"),
        ({"prompt": ["x"] * 65, "n": 4}, 400, "260 choices"),
        ({"prompt": ""}, 400, "token_ids is empty"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [5000]}, 400, "5000"),
        ({"prompt": [-1]}, 400, "token id"),
        ({"prompt": "x" * 5000}, 400, "5000 tokens"),
        ({"echo": True}, 400, "echo"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"logprobs": 5}, 400, "logprobs = 5"),
        ({"best_of": 3}, 400, "best_of"),
        ({"regex": "a+", "ebnf": 'root ::= "a"'}, 400, "only one of regex, ebnf"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400, "response_format"),
        ({"json_schema": "{"}, 400, "json_schema is not JSON"),
        ({"tools": [{"type": "function"}]}, 400, "tools"),
        ({"seed": 2**40}, 400, "seed"),
        ({"priority": "urgent"}, 400, "priority = 'urgent' is not low, normal or high"),
        ({"session": "s" * 300}, 400, "session"),
        ({"stop": [""]}, 400, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_input_is_an_error_object(door, change, status, says, stream):
    body = {"model": "fake", "prompt": TEXT, "max_tokens": 2, "stream": stream, **change}
    reply = await door.http.post("/v1/completions", json=body)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert says in error["message"] and error["type"] == "invalid_request_error"
    await door.mesh.idle()


async def test_what_is_no_json_and_what_is_not_there(door):
    reply = await door.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"
    reply = await door.http.get("/v1/nothing")
    assert reply.status_code == 404 and "/v1/nothing" in reply.json()["error"]["message"]
    assert (await door.http.get("/openapi.json")).json()["info"]["title"] == "kvmesh router"
    assert (await door.http.get("/health")).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status"), [(ResourceExhausted("full"), 429), (Unavailable("away"), 503), (FailedPrecondition("no"), 409)]
)
async def test_failures_of_engines_have_a_status(door, fault, status):
    for engine in door.mesh.engines:
        engine.faults["StartGenerate"] = fault
    with pytest.raises(openai.APIStatusError) as caught:
        await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=2)
    assert caught.value.status_code == status


async def test_a_failure_in_mid_stream_ends_the_stream_with_an_error(door):
    for engine in door.mesh.engines:
        engine.die_after = 2
    with pytest.raises(openai.APIError):
        stream = await door.openai.completions.create(model="fake", prompt=TEXT, max_tokens=20, stream=True)
        [chunk async for chunk in stream]
    await door.mesh.idle()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels(door, stream):
    gate = asyncio.Event()
    for engine in door.mesh.engines:
        engine.pause_after = (3, gate)
    body = {"model": "fake", "prompt": TEXT, "max_tokens": 20, "stream": stream}

    async def ask() -> None:
        async with door.http.stream("POST", "/v1/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                pass

    asking = asyncio.create_task(ask())
    busy = asyncio.gather(*(e.until(lambda e=e: e.generating > 0) for e in door.mesh.engines), return_exceptions=True)
    done = asyncio.create_task(door.mesh.engines[0].until(lambda: any(e.generating for e in door.mesh.engines)))
    await asyncio.wait({done, busy}, return_when=asyncio.FIRST_COMPLETED)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    busy.cancel()
    await door.mesh.idle()


async def test_sub_requests(door):
    prep, send, start = (f"/v1/microserving/{n}" for n in ("e1/prep_recv", "e0/remote_send", "e1/start_generate"))
    assert (await door.http.get("/v1/microserving/engines")).json() == {"engines": ["e0", "e1"]}
    ticket = (await door.http.post(prep, json={"token_ids": PROMPT, "end": -1})).json()["ticket"]
    assert ticket["end"] == len(PROMPT) - 1
    sent = await door.http.post(send, json={"token_ids": PROMPT, "begin": 0, "end": -1, "ticket": ticket})
    assert sent.status_code == 200 and sent.json()["sent_tokens"] == len(PROMPT) - 1
    body = {"token_ids": PROMPT, "begin": ticket["end"], "ticket": ticket, "sampling": {"max_new_tokens": 4}}
    lines = (await door.http.post(start, json=body)).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert [t for e in events if "chunk" in e for t in e["chunk"]["token_ids"]] == answer(PROMPT, 4)
    assert events[-1]["finished"]["usage"]["cached_tokens"] == len(PROMPT) - 1
    other = (await door.http.post(prep, json={"token_ids": PROMPT, "end": 3})).json()["ticket"]
    released = await door.http.post("/v1/microserving/e1/release", json={"ticket": other})
    assert released.json() == {"released": True}


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("e9/prep_recv", {"token_ids": [1], "end": 1}, 404),
        ("e1/prep_recv", {"token_ids": [1], "end": 7}, 400),
        ("e1/prep_recv", {"tokens": [1]}, 400),
        ("e1/prep_recv", {"token_ids": [-1]}, 400),
        ("e1/start_generate", {"token_ids": [1], "begin": 1}, 400),
        ("e1/start_generate", {"token_ids": [1], "begin": 0, "ticket": {"id": 5}}, 409),
    ],
)
async def test_bad_sub_requests(door, path, body, status):
    reply = await door.http.post(f"/v1/microserving/{path}", json=body)
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize(("call", "method"), [("prep_recv", "PrepRecv"), ("start_generate", "StartGenerate")])
async def test_a_client_that_leaves_a_sub_request_cancels_it(door, call, method):
    engine = door.mesh.engines[1]
    engine.gates[method] = asyncio.Event()
    asking = asyncio.create_task(door.http.post(f"/v1/microserving/e1/{call}", json={"token_ids": PROMPT}))
    await engine.until(lambda: engine.requests(method))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await engine.until(lambda: method in engine.cancelled)
    await door.mesh.idle()
