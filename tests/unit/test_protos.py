"""The protos keep to buf's rules: by buf where it is, and by their descriptors and text everywhere."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from kvmesh.v1 import common_pb2, engine_pb2, kv_pb2, kvstore_pb2, operator_pb2, registry_pb2, router_pb2

PROTOS = Path(__file__).parents[2] / "protos"
MODULES = (common_pb2, engine_pb2, kv_pb2, kvstore_pb2, operator_pb2, registry_pb2, router_pb2)
FILES = [module.DESCRIPTOR for module in MODULES]
SNAKE, CAMEL = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*"), re.compile(r"([A-Z][a-z0-9]*)+")
# As protos/buf.yaml says.
OWN_STATUS = {"Engine.WatchStatus", "KvStore.WatchStatus"}
BUF = shutil.which("buf") or str(
    Path.home() / ".cache" / "kvmesh" / "clients" / "buf" / "node_modules" / ".bin" / "buf"
)


def messages(file) -> list:
    found, left = [], list(file.message_types_by_name.values())
    while left:
        message = left.pop()
        found.append(message)
        left += [m for m in message.nested_types if not m.GetOptions().map_entry]
    return found


@pytest.mark.skipif(not Path(BUF).exists(), reason="needs buf: make clients")
def test_buf_lint():
    done = subprocess.run([BUF, "lint", str(PROTOS)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_known_here():
    assert {f.name for f in FILES} == {str(p.relative_to(PROTOS)) for p in PROTOS.rglob("*.proto")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_packages_names_and_enums(file):
    raw = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(raw)
    assert file.package == "kvmesh.v1" and file.name.startswith("kvmesh/v1/") and raw.syntax == "proto3"
    for message in messages(file):
        assert CAMEL.fullmatch(message.name), message.full_name
        for field in message.fields:
            assert SNAKE.fullmatch(field.name), field.full_name
        for oneof in message.oneofs:
            assert SNAKE.fullmatch(oneof.name.lstrip("_")), oneof.full_name
    for enum in file.enum_types_by_name.values():
        prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper()
        assert enum.values[0].name == f"{prefix}_UNSPECIFIED" and enum.values[0].number == 0
        assert all(re.fullmatch(rf"{prefix}_[A-Z0-9_]+", value.name) for value in enum.values), enum.full_name


def test_calls_have_messages_of_their_own():
    used: list[str] = []
    for file in FILES:
        for service in file.services_by_name.values():
            assert CAMEL.fullmatch(service.name)
            for method in service.methods:
                assert CAMEL.fullmatch(method.name)
                used += [method.input_type.full_name, method.output_type.full_name]
                if f"{service.name}.{method.name}" in OWN_STATUS:
                    continue
                for kind, end in ((method.input_type, "Request"), (method.output_type, "Response")):
                    assert kind.name in (f"{method.name}{end}", f"{service.name}{method.name}{end}"), method.full_name
    assert len(used) == len(set(used)), "a message serves two calls"


def test_calls_and_enums_are_described():
    for path in PROTOS.rglob("*.proto"):
        lines = path.read_text().splitlines()
        assert lines[0].startswith("// "), path.name
        for above, line in itertools.pairwise(lines):
            if re.match(r"\s*rpc |enum ", line):
                assert above.lstrip().startswith("//"), f"{path.name}: {line.strip()}"


def test_imports_are_used_and_numbers_are_not_used_twice():
    pool = descriptor_pool.Default()
    for file in FILES:
        needed = {
            field.message_type.file.name if field.message_type is not None else field.enum_type.file.name
            for message in messages(file)
            for field in message.fields
            if field.message_type is not None or field.enum_type is not None
        } - {file.name}
        assert {d.name for d in file.dependencies} == needed, file.name
        assert pool.FindFileByName(file.name) is file or pool.FindFileByName(file.name).name == file.name
