"""Answers of a form that was asked for, and answers that go on where another engine stopped."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from direct import DirectEngine
from hf_reference import END, Reference
from mesh_process import RunningMesh
from openai import AsyncOpenAI, BadRequestError
from prompts import prompt

from kvmesh.client import AsyncClient
from kvmesh.errors import InvalidArgument
from kvmesh.v1.common_pb2 import FINISH_REASON_STOP_STRING, FINISH_REASON_STOP_TOKEN

# END, the letter e, ends a sequence of this model: no form here has one.
PROMPT = prompt(60, "sampling")
PHONE = r"[0-9]{3}-[0-9]{4}"
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
BITS = 'root ::= ("0" | "1"){12} "."'
FORMS: list[dict[str, Any]] = [{"regex": PHONE}, {"ebnf": BITS}, {"json_schema": json.dumps({"enum": ["up", "down"]})}]


def fits(form: dict[str, Any], text: str) -> bool:
    patterns = {"regex": PHONE, "ebnf": r"[01]{12}\.", "json_schema": '"(up|down)"'}
    return re.fullmatch(patterns[next(iter(form))], text) is not None


def text_of(token_ids: list[int]) -> str:
    return bytes(t for t in token_ids if t < 256 and t != END).decode()


@pytest.mark.parametrize("strategy", ["data_parallel", "prefill_decode", "balanced_prefill_decode"])
async def test_an_answer_has_the_form_that_was_asked_for(strategy: str, client: AsyncClient) -> None:
    """Also beside others of another form, or of none."""
    free = [client.generate(PROMPT, strategy=strategy, max_new_tokens=20, temperature=0).wait() for _ in range(2)]
    bound = [
        client.generate(PROMPT, strategy=strategy, max_new_tokens=40, temperature=1, seed=seed, **form).wait()
        for form in FORMS
        for seed in range(3)
    ]
    results = await asyncio.gather(*bound, *free)
    for i, result in enumerate(results[: len(bound)]):
        assert fits(FORMS[i // 3], text_of(result.token_ids)), result.text
        assert result.reason == "stop_token"
    assert len({r.text for r in results[:6]}) > 2
    assert not any(fits(form, r.text) for r in results[len(bound) :] for form in FORMS)


async def test_openai_clients_ask_for_json(mesh: RunningMesh) -> None:
    address = (Path(mesh.state.work) / "router.address.http").read_text().strip()
    async with AsyncOpenAI(base_url=f"http://{address}/v1", api_key="none", max_retries=0) as openai:
        reply = await openai.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": "Which pet?"}],
            max_tokens=200,
            temperature=0.5,
            seed=1,
            response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}},
        )
        pet = json.loads((reply.choices[0].message.content or "").removesuffix(chr(END)))
        assert pet["kind"] in ("cat", "dog") and 1 <= pet["count"] <= 9 and len(pet) == 2
        assert reply.choices[0].finish_reason == "stop"
        with pytest.raises(BadRequestError, match=r"regex|compile"):
            await openai.completions.create(model="", prompt="x", max_tokens=4, extra_body={"regex": "(["})


@pytest.mark.parametrize("form", [{"regex": "(["}, {"ebnf": "nonsense"}, {"json_schema": "{"}, {"regex": "a" * 65537}])
async def test_what_cannot_be_compiled_is_refused(form: dict[str, str], client: AsyncClient) -> None:
    with pytest.raises(InvalidArgument):
        await client.generate(PROMPT, max_new_tokens=4, **form).wait()


@pytest.mark.parametrize(
    "sampling",
    [
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.8},
        {"temperature": 1.5, "seed": 3, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {"regex": "[a-f]{8}[0-9]{8}"},
    ],
)
async def test_another_engine_goes_on_as_the_first_would_have(
    sampling: dict[str, Any], engines: list[DirectEngine]
) -> None:
    whole = (await engines[0].generate(PROMPT, max_new_tokens=16, **sampling)).token_ids
    alone = 0
    for done in (1, 7, 15):
        tokens, left = PROMPT + whole[:done], 16 - done
        rest = await engines[1].generate(tokens, generated=done, max_new_tokens=left, **sampling)
        assert whole[:done] + rest.token_ids == whole
        other = await engines[1].generate(tokens, max_new_tokens=left, **sampling)
        alone += other.token_ids == rest.token_ids
    assert alone < 3, "it would have gone on so without being told what was generated before"


async def test_a_stop_string_may_begin_before(engines: list[DirectEngine], reference: Reference) -> None:
    greedy = reference.tokens(PROMPT, 24)
    text = bytes(greedy).decode("ascii")
    at = next(i for i in range(5, 20) if text.find(text[i : i + 3]) == i)
    answer = await engines[0].generate(
        PROMPT + greedy[: at + 2], generated=at + 2, max_new_tokens=10, stop_strings=[text[at : at + 3]]
    )
    assert answer.token_ids == greedy[at + 2 : at + 3]
    assert answer.finished.reason == FINISH_REASON_STOP_STRING


async def test_the_form_ends_the_answer(engines: list[DirectEngine]) -> None:
    """Where nothing but the end may follow, also when the end of the sequence is ignored."""
    for ignore_eos in (True, False):
        answer = await engines[0].generate(PROMPT, max_new_tokens=40, regex=PHONE, ignore_eos=ignore_eos)
        assert re.fullmatch(PHONE, text_of(answer.token_ids)) and len(answer.token_ids) == 9
        assert answer.finished.reason == FINISH_REASON_STOP_TOKEN
    with pytest.raises(grpc.aio.AioRpcError, match="does not allow") as refused:
        await engines[0].generate([*PROMPT, 65], generated=1, max_new_tokens=4, regex=PHONE)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError, match="generated = 60"):
        await engines[0].generate(PROMPT, generated=60, max_new_tokens=4)
