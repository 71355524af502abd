"""Generates the gRPC stubs, also for editable installs; everything else is in pyproject.toml."""

from __future__ import annotations

import importlib.resources
import os
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build import build
from setuptools.errors import ExecError

# Relative: build backends run this in its folder, and protoc wants one spelling of every path.
PROTOS = Path("protos")
# protoc wants its plugins as programs; this needs no scripts folder on PATH.
PLUGIN = "#!{python}\nimport sys\nsys.path[:] = {path!r}\nfrom mypy_protobuf.main import {function}\n{function}()\n"


class build_protos(Command):  # noqa: N801
    """kvmesh/v1/*_pb2.py, *_pb2_grpc.py and their .pyi, from protos/kvmesh/v1/*.proto."""

    description = "generate gRPC stubs from protos/"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []
    # setuptools asks this of whatever runs within `build`.
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        from grpc_tools import protoc

        wellknown = importlib.resources.files("grpc_tools") / "_proto"
        with tempfile.TemporaryDirectory() as folder:
            plugins = [f"--plugin={name}={program}" for name, program in _plugins(Path(folder)).items()]
            arguments = ["protoc", f"-I{PROTOS}", f"-I{wellknown}", *plugins]
            arguments += [f"--{kind}_out=." for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
            if protoc.main([*arguments, *self.get_source_files()]) != 0:
                raise ExecError("protoc failed on protos/kvmesh/v1")

    def get_source_files(self) -> list[str]:
        return sorted(str(path) for path in PROTOS.glob("kvmesh/v1/*.proto"))

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


def _plugins(folder: Path) -> dict[str, Path]:
    programs = {}
    for name, function in (("protoc-gen-mypy", "main"), ("protoc-gen-mypy_grpc", "grpc")):
        program = programs[name] = folder / name
        program.write_text(PLUGIN.format(python=sys.executable, path=sys.path, function=function))
        os.chmod(program, 0o755)
    return programs


build.sub_commands.insert(0, ("build_protos", None))
setup(cmdclass={"build_protos": build_protos})
