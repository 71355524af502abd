"""Texts and tables of the commands."""

import io
import json

import pytest
from rich.console import Console

from kvmesh.client import Result
from kvmesh.local.show import Screen, choice_line, mesh_page, result_json, result_page, share_text, strategies_page
from kvmesh.v1 import router_pb2 as pb
from kvmesh.v1.common_pb2 import GenerateUsage


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(what, width: int = 160) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, color_system=None).print(what)
    return out.getvalue()


def result(**fields) -> Result:
    given = {
        "request_id": "r-1",
        "strategy": "prefill_decode",
        "strategy_revision": 0,
        "text": "ü!",
        "token_ids": [195, 188, 33],
        "logprobs": [],
        "reason": "length",
        "matched": None,
        "usage": GenerateUsage(prompt_tokens=100, cached_tokens=99, completion_tokens=3),
        "ttft_seconds": 0.25,
        "tpot_seconds": 0.01,
        "jct_seconds": 0.27,
        "shares": [
            pb.EngineShare(engine="engine-0", prefilled_tokens=99, sent_bytes=2048, transport="shm"),
            pb.EngineShare(engine="engine-1", received_tokens=99, prefilled_tokens=1, decoded_tokens=3),
        ],
        "attempts": 1,
        "trace_id": "ab" * 16,
    }
    return Result(**{**given, **fields})


def test_control_characters_do_not_reach_a_terminal_but_a_pipe_gets_the_text_as_it_is():
    text = "a\x1b[31mb\x07\x9bc\td\n\x7f\r\u0085é"
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        screen = Screen(out)
        screen.write(text)
        screen.end()
    assert terminal.getvalue() == "a␛[31mb␇\ufffdc\td\n␡␍\ufffdé\n"
    assert pipe.getvalue() == text + "\n"


@pytest.mark.parametrize(
    ("written", "shown"), [([], ""), ([""], ""), (["x"], "x\n"), (["x\n"], "x\n"), (["x\n", ""], "x\n")]
)
def test_a_line_that_was_begun_is_ended_once(written, shown):
    out = io.StringIO()
    screen = Screen(out)
    for text in written:
        screen.write(text)
    screen.end()
    screen.end()
    assert out.getvalue() == shown


def mesh(**fields) -> pb.GetMeshResponse:
    page = pb.GetMeshResponse(registry_connected=True, running_requests=3, **fields)
    page.router.name = "router-1"
    page.strategy.name = "prefill_decode"
    page.strategy.params.update({"prefill": "1", "min_remote": "16"})
    page.strategy.revision = 7
    return page


def test_the_mesh_with_its_engines():
    page = mesh()
    engine = page.engines.add(connected=True)
    engine.member.endpoint.name, engine.member.endpoint.address = "engine-0", "127.0.0.1:7"
    engine.member.labels["role"] = "prefill"
    engine.info.total_slots, engine.info.device, engine.info.runtime = 16384, "cpu", "sglang 0.5.17"
    engine.info.model.name, engine.info.layout.dtype = "tiny", "float32"
    engine.load.running_requests, engine.load.free_slots, engine.load.reserved_slots = 2, 16000, 84
    page.engines.add().member.endpoint.name = "engine-1"
    text = drawn(mesh_page(page, "127.0.0.1:8400", ["engine-2 killed by SIGKILL"]))
    lines = text.splitlines()
    assert lines[0].split() == ["router", "router-1", "at", "127.0.0.1:8400,", "3", "requests", "running"]
    assert "connected" in lines[1]
    assert "prefill_decode min_remote=16 prefill=1 (revision 7)" in lines[2]
    assert lines[3].split() == ["model", "tiny", "in", "float32", "on", "cpu,", "sglang", "0.5.17"]
    assert "engine-2 killed by SIGKILL" in lines[4]
    (row,) = [line.split() for line in lines if line.startswith("engine-0")]
    assert row == ["engine-0", "127.0.0.1:7", "up", "2", "0", "16000", "0", "0", "84", "16384", "role=prefill"]
    (row,) = [line.split() for line in lines if line.startswith("engine-1")]
    assert row[1] == "lost"


def test_models_are_told_apart():
    page = mesh()
    for i, name in enumerate(("a", "b", "a")):
        engine = page.engines.add()
        engine.member.endpoint.name, engine.info.model.name, engine.info.device = f"engine-{i}", name, "cpu"
    lines = [line for line in drawn(mesh_page(page, "x:1", [])).splitlines() if line.startswith("model")]
    assert [line.split(": ")[1] for line in lines] == ["engine-0, engine-2", "engine-1"]


def test_an_empty_mesh_and_a_registry_that_is_away_are_told():
    page = mesh()
    page.registry_connected = False
    text = drawn(mesh_page(page, "x:1", []))
    assert "no engines" in text and "not reached: this is what was last known" in text


def test_a_trial_is_told():
    page = mesh()
    assert "trial" not in drawn(mesh_page(page, "x:1", []))
    page.trial.name, page.trial.revision, page.trial.share_percent = "prefill_decode", 7, 10
    assert "trial     prefill_decode (revision 7, on trial for 10 % of the sessions)" in drawn(
        mesh_page(page, "x:1", [])
    )


def test_a_narrow_terminal_loses_no_number():
    page = mesh()
    engine = page.engines.add(connected=True)
    engine.member.endpoint.name, engine.member.endpoint.address = "engine-0", "127.0.0.1:40123"
    engine.info.total_slots, engine.load.free_slots, engine.load.cached_slots = 16384, 15000, 1384
    engine.info.model.name, engine.info.device, engine.info.runtime = "tiny-0123456789ab", "cpu", "sglang 0.5.17"
    for width in (100, 80):
        text = drawn(mesh_page(page, "127.0.0.1:8400", []), width)
        assert max(map(len, text.splitlines())) <= width
        for number in ("15000", "1384", "16384", "127.0.0.1:40123"):
            assert number in text


def test_strategies_with_their_parameters():
    infos = [pb.StrategyInfo(name="a", summary="Does [this]."), pb.StrategyInfo(name="b", summary="Does that.")]
    infos[1].params.add(name="ratio", type="float", default_value="0.2", constraint="0 to 1")
    infos[1].params.add(name="deep", type="bool", default_value="true")
    lines = drawn(strategies_page(infos, "b")).splitlines()
    assert "Does [this]." in lines[1] and "(in force)" not in lines[1]
    assert lines[2].startswith("b (in force)") and "ratio=0.2 (float, 0 to 1)" in lines[2]
    assert "deep=true (bool)" in lines[3]


def test_a_choice_on_one_line():
    choice = pb.StrategyChoice(name="x", params={"b": "2", "a": "1"}, revision=3)
    assert choice_line(choice) == "x a=1 b=2 (revision 3)"


def test_the_summary_under_an_answer():
    assert result_page(result()).splitlines() == [
        "prefill_decode: 100 prompt tokens, 3 new, ended by length",
        "ttft 250.0 ms, tpot 10.0 ms, jct 270.0 ms",
        "  engine-0: 99 prefilled, sent 2.0 KiB over shm",
        "  engine-1: 99 received, 1 prefilled, 3 decoded",
        "kvmesh trace r-1",
    ]
    other = result_page(result(reason="stop_string", matched="\n", attempts=2, trace_id="", shares=[])).splitlines()
    assert other[0].endswith("ended by stop string '\\n'") and other[1].endswith(", 2 attempts")
    assert other[-1] == "request r-1 (not traced)"


def test_shares_in_words():
    assert share_text(pb.EngineShare(engine="e")) == "nothing"
    assert share_text(pb.EngineShare(cached_tokens=5, decoded_tokens=1)) == "5 tokens cached, 1 decoded"


def test_the_result_as_json_has_everything():
    fields = json.loads(result_json(result(matched=5, reason="stop_token")))
    assert fields["text"] == "ü!" and fields["token_ids"] == [195, 188, 33] and fields["matched"] == 5
    assert fields["usage"]["cached_tokens"] == 99 and fields["shares"][0]["engine"] == "engine-0"
    assert fields["shares"][0]["sent_bytes"] == 2048 and fields["shares"][0]["decoded_tokens"] == 0
    assert "\n" not in result_json(result())
