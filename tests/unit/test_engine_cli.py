"""`kvmesh engine`: its settings, and what it says before anything heavy is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from kvmesh.dataplane.layout import Layout
from kvmesh.errors import InvalidArgument
from kvmesh.modelfolder import layout_of, model_digest
from kvmesh.v1.common_pb2 import Endpoint
from services.engine import main
from services.engine.cli import EngineConfig, engine


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(engine, arguments, env=environment)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"model": ""}, "give either --model FOLDER or --sim PROFILE"),
        ({"sim": "profile"}, "give either --model FOLDER or --sim PROFILE"),
        ({"model": "", "sim": "p", "page_size": 16}, "page_size = 16"),
        ({"listen": "nowhere"}, "'nowhere' is not HOST:PORT"),
        ({"registry": "nowhere"}, "'nowhere' is not HOST:PORT"),
        ({"advertise": "host:99999"}, "'host:99999'"),
        ({"name": "a b"}, "name = 'a b'"),
        ({"name": "x" * 64}, "1 to 63 characters"),
        ({"dtype": "int8"}, "dtype = 'int8' is not one of auto, float32, bfloat16, float16"),
        ({"kv_tokens": -1}, "kv_tokens = -1 is negative"),
        ({"chunk_tokens": -5}, "chunk_tokens = -5 is negative"),
        ({"max_running": -2}, "max_running = -2 is negative"),
        ({"page_size": 0}, "page_size = 0 is not between 1 and 1024"),
        ({"page_size": 1025}, "page_size = 1025"),
        ({"labels": "role"}, "labels: 'role' is not key=value"),
        ({"labels": "a=b,=c"}, "labels: '=c'"),
        ({"sglang": "{"}, "sglang = '{' is not JSON"),
        ({"sglang": "[1]"}, "sglang = '[1]' is not a JSON object"),
        ({"trace_ratio": 2.0}, "trace_ratio = 2.0"),
        ({"log_level": "loud"}, "log_level = 'loud'"),
    ],
    ids=lambda v: v if isinstance(v, str) else next(iter(v)),
)
def test_bad_settings(fields, says):
    with pytest.raises(InvalidArgument) as caught:
        EngineConfig(**{"model": "m", **fields})
    assert says in str(caught.value)


def test_good_settings():
    config = EngineConfig(model="m", labels="role=decode,zone=a=b,", sglang='{"mem_fraction_static": 0.5}')
    assert config.parsed_labels() == {"role": "decode", "zone": "a=b"}
    assert config.parsed_sglang() == {"mem_fraction_static": 0.5}
    plain = EngineConfig(model="m")
    assert plain.parsed_labels() == {} and plain.parsed_sglang() == {}


def test_a_wrong_setting_is_a_usage_error():
    result = run("--model", "m", "--page-size", "0")
    assert result.exit_code == 2 and "page_size = 0" in result.output
    result = run()
    assert result.exit_code == 2 and "--model FOLDER" in result.output
    result = run("--kv-tokens", "many", "--model", "m")
    assert result.exit_code == 2


def test_settings_come_from_the_environment(monkeypatch):
    seen = []
    monkeypatch.setattr(main, "serve", lambda config: seen.append(config))
    monkeypatch.setattr("kvmesh.aio.run", lambda work: None)
    monkeypatch.setattr("kvmesh.aio.setup_logging", lambda *args: None)
    result = run("--name", "e7", KVMESH_ENGINE_MODEL="/m", KVMESH_ENGINE_KV_TOKENS="4096", KVMESH_ENGINE_NAME="other")
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.model, config.kv_tokens, config.name) == ("/m", 4096, "e7")


def test_help_is_light():
    """Neither torch nor SGLang nor gRPC is loaded for it."""
    code = (
        "import sys, services.engine.cli as c\n"
        "from click.testing import CliRunner\n"
        "result = CliRunner().invoke(c.engine, ['--help'])\n"
        "assert result.exit_code == 0 and '--page-size' in result.output\n"
        "print([m for m in ('torch', 'sglang', 'grpc', 'transformers', 'numpy') if m in sys.modules])\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert told.stdout.strip() == "[]"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_folder_that_is_no_model(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    program = [sys.executable, "-m", "kvmesh.cli", "engine", "--model", str(tmp_path), "--trace-ratio", "0"]
    told = subprocess.run(program, capture_output=True, text=True, timeout=60)
    # One line for people, no stack trace.
    assert told.returncode == 1 and "config.json" in told.stderr and "Traceback" not in told.stderr
    assert told.stderr.strip().splitlines()[-1].startswith("Error: ")


# What the model's folder says


CONFIG = {"num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 2, "num_hidden_layers": 3}


def folder(path: Path, config: dict[str, object], weights: bytes = b"w" * 100) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    (path / "model.safetensors").write_bytes(weights)
    return path


def test_models_are_told_apart(tmp_path):
    first = folder(tmp_path / "a", CONFIG)
    digest = model_digest(first)
    assert len(digest) == 32 and digest == model_digest(folder(tmp_path / "same", CONFIG))
    others = [
        folder(tmp_path / "config", {**CONFIG, "num_hidden_layers": 4}),
        folder(tmp_path / "size", CONFIG, b"w" * 101),
        folder(tmp_path / "weights", CONFIG, b"x" * 100),
    ]
    (folder(tmp_path / "more", CONFIG) / "model-2.safetensors").write_bytes(b"")
    digests = {model_digest(p) for p in [*others, tmp_path / "more"]}
    assert len(digests) == 4 and digest not in digests
    # The order of keys says nothing.
    assert model_digest(folder(tmp_path / "turned", dict(reversed(CONFIG.items())))) == digest


def test_the_layout_that_a_model_will_have(tmp_path):
    path = folder(tmp_path / "a", {**CONFIG, "torch_dtype": "bfloat16"})
    wanted = Layout(model_digest(path), "bfloat16", layers=3, heads=2, k_dim=8, v_dim=8, page_size=16)
    assert layout_of(path, "auto", 16) == wanted
    assert layout_of(path, "float32", 16).dtype == "float32"
    path = folder(tmp_path / "b", {**CONFIG, "head_dim": 16, "num_key_value_heads": None})
    assert (layout_of(path, "float32", 1).heads, layout_of(path, "float32", 1).k_dim) == (4, 16)
    with pytest.raises(InvalidArgument, match="dtype = 'auto'"):
        layout_of(path, "auto", 1)
    with pytest.raises(InvalidArgument, match="num_attention_heads"):
        layout_of(folder(tmp_path / "c", {}), "float32", 1)


@pytest.mark.parametrize(
    ("given", "config", "dtype"),
    [
        ("auto", {"dtype": "float32"}, "float32"),
        ("auto", {"torch_dtype": "bfloat16"}, "bfloat16"),
        ("auto", {"dtype": "float16", "torch_dtype": "float32"}, "float16"),
        ("auto", {"dtype": "fp8"}, "auto"),
        ("auto", {}, "auto"),
        ("bfloat16", {"dtype": "float32"}, "bfloat16"),
    ],
)
def test_auto_is_what_the_model_says(tmp_path, given, config, dtype):
    path = folder(tmp_path / "a", config)
    assert main._dtype(EngineConfig(model=str(path), dtype=given), path) == dtype


def test_the_run_folder(tmp_path):
    class Stack:
        def __init__(self) -> None:
            self.calls: list[tuple[object, ...]] = []

        def callback(self, *call: object, **_kwargs: object) -> None:
            self.calls.append(call)

    given = Stack()
    path = main._run_dir(EngineConfig(model="m", run_dir=str(tmp_path / "run")), given)
    # What somebody else gave is not ours to remove.
    assert path == tmp_path / "run" and given.calls == []
    made = Stack()
    path = main._run_dir(EngineConfig(model="m"), made)
    ((remove, folder_),) = made.calls
    assert path.is_absolute() and path.is_dir() and str(path) == folder_ and path.name.startswith("kvmesh-engine-")
    remove(folder_)
    assert not path.exists()


def test_what_the_engine_says_of_itself(tmp_path):
    layout = Layout("0" * 32, "float32", 2, 2, 4, 4, 1)
    runtime = SimpleNamespace(
        model=SimpleNamespace(vocab_size=320, context_length=100, eos_token_ids=(1, 2)),
        layout=layout,
        total_slots=64,
        device="cpu",
        version="fake 1",
        pools={"shm": [], "gloo": []},
    )
    info = main.describe(Endpoint(name="e"), runtime, "tiny", "/models/tiny")
    assert (info.model.name, info.model.path, info.total_slots) == ("tiny", "/models/tiny", 64)
    assert (list(info.transports), info.layout) == (["shm", "gloo"], layout.message())
