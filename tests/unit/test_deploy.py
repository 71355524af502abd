"""Files in deploy/: they parse, and name only metrics, stages and options that exist."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from prometheus_client import CollectorRegistry

from services.engine.cli import engine
from services.engine.metrics import Totals, register
from services.kvstore.cli import kvstore
from services.registry.cli import registry
from services.router.cli import router
from services.router.door import Door
from services.router.metrics import RouterMetrics
from services.router.view import MeshView

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
OPTIONS = re.compile(r"--[a-z-]+")


class _Pretend:
    """Just enough of Door, MeshView and Status to be asked for metrics."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def known_metrics() -> set[str]:
    from kvmesh.v1.engine_pb2 import LoadReport

    made = CollectorRegistry()
    view = _Pretend(connected=0, links={})
    RouterMetrics(made, _Pretend(running=0), view)  # type: ignore[arg-type]
    register(made, _Pretend(load=LoadReport), Totals())  # type: ignore[arg-type]
    names = set()
    for family in made.collect():
        suffixes = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_alerts_and_dashboards_name_metrics_that_exist():
    assert Door and MeshView
    texts = [(DEPLOY / "prometheus" / "alerts.yml").read_text()]
    dashboards = list((DEPLOY / "grafana" / "dashboards").glob("*.json"))
    assert dashboards
    for path in dashboards:
        texts += [t["expr"] for panel in json.loads(path.read_text())["panels"] for t in panel["targets"]]
    named = set(re.findall(r"\bkvmesh_[a-z_]+", "\n".join(texts)))
    assert named and named <= known_metrics(), named - known_metrics()


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yml")), ids=lambda p: p.name)
def test_files_parse(path: Path):
    assert yaml.safe_load(path.read_text())


def test_every_service_builds_from_a_stage_that_exists_and_depends_on_services_that_exist():
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE))
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            assert service["build"]["target"] in stages, name
        assert set(service.get("depends_on", [])) <= set(COMPOSE["services"]), name


@pytest.mark.parametrize(
    "name", [n for n, s in COMPOSE["services"].items() if s.get("image", "").startswith("kvmesh/")]
)
def test_commands_use_options_that_exist(name: str):
    image = COMPOSE["services"][name]["image"].removeprefix("kvmesh/")
    commands = {"registry": registry, "router": router, "sim": engine, "engine": engine}
    command = {**commands, "kvstore": kvstore, "sim-kvstore": kvstore}[image]
    known = set(OPTIONS.findall(CliRunner().invoke(command, ["--help"]).output))
    assert set(OPTIONS.findall(COMPOSE["services"][name]["command"])) <= known


def test_the_store_has_the_torch_of_the_engines():
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    (pin,) = re.findall(r'"torch==([0-9.]+)"', project)
    assert f"ARG TORCH={pin}\n" in (DEPLOY / "Dockerfile").read_text()
    assert COMPOSE["x-build"]["args"]["TORCH"] == f"${{TORCH:-{pin}}}"


def test_only_loopback_is_published():
    published = [p for s in COMPOSE["services"].values() for p in s.get("ports", [])]
    assert published and all(p.startswith("127.0.0.1:") for p in published)
