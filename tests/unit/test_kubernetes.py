"""deploy/k8s: kustomize makes whole manifests of it, whose parts fit each other and kvmesh's options.

A check of structure; deploy/README.md has the command that holds them against Kubernetes' schemas.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from services.engine.cli import engine
from services.kvstore.cli import kvstore
from services.registry.cli import registry
from services.router.cli import router

K8S = Path(__file__).resolve().parents[2] / "deploy" / "k8s"
COMMANDS = {
    "registry": registry,
    "router": router,
    "kvstore": kvstore,
    "sim-kvstore": kvstore,
    "sim": engine,
    "engine": engine,
}
KUBECTL = shutil.which("kubectl") or shutil.which("kustomize")


def test_every_file_named_exists_and_parses() -> None:
    folders = [path.parent for path in K8S.rglob("kustomization.yaml")]
    assert {f.name for f in folders} == {"base", "sim", "sglang", "secure", "sim-secure"}
    for folder in folders:
        content = yaml.safe_load((folder / "kustomization.yaml").read_text())
        named = [*content.get("resources", []), *content.get("components", [])]
        named += [p["path"] for p in content.get("patches", [])]
        assert named
        for name in named:
            assert (folder / name).exists(), f"{folder.name}: {name}"
        assert {p.name for p in folder.glob("*.yaml")} <= {*named, "kustomization.yaml"}
    for path in K8S.rglob("*.yaml"):
        assert all(list(yaml.safe_load_all(path.read_text())))


def made(overlay: str) -> list[dict[str, Any]]:
    words = ["kustomize"] if Path(str(KUBECTL)).name == "kubectl" else ["build"]
    done = subprocess.run([str(KUBECTL), *words, str(K8S / overlay)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.skipif(KUBECTL is None, reason="needs kubectl or kustomize")
@pytest.mark.parametrize("overlay", ["sim", "sglang", "sim-secure"])
def test_the_parts_fit(overlay: str) -> None:
    parts = made(overlay)
    assert len({(p["kind"], p["metadata"]["name"]) for p in parts}) == len(parts)
    services = {p["metadata"]["name"]: p["spec"] for p in parts if p["kind"] == "Service"}
    loads = [p for p in parts if p["kind"] in ("Deployment", "StatefulSet")]
    assert (
        {p["metadata"]["name"] for p in loads} == {"etcd", "registry", "router", "kvstore", "engine"} == set(services)
    )
    for load in loads:
        name, spec = load["metadata"]["name"], load["spec"]
        template = spec["template"]
        assert load["metadata"]["namespace"] == "kvmesh"
        assert spec["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert services[name]["selector"].items() <= template["metadata"]["labels"].items()
        (container,) = template["spec"]["containers"]
        ports = {p["containerPort"] for p in container["ports"]}
        assert {p["port"] for p in services[name]["ports"]} <= ports
        volumes = {v["name"] for v in template["spec"].get("volumes", [])}
        volumes |= {c["metadata"]["name"] for c in spec.get("volumeClaimTemplates", [])}
        assert {m["name"] for m in container["volumeMounts"]} == volumes, name
        if load["kind"] == "StatefulSet":
            assert spec["serviceName"] in services
        kind = "sim" if overlay.startswith("sim") else overlay
        stands_for = {("sim", "engine"): "kvmesh/sim", ("sim", "kvstore"): "kvmesh/sim-kvstore"}
        if name in ("engine", "kvstore"):
            assert container["image"] == stands_for.get((kind, name), f"kvmesh/{name}")
            assert any(a.startswith("--sim=") for a in container["args"]) == (kind == "sim")
        if container["image"].startswith("kvmesh/"):
            _look_at(container, template["spec"], services, overlay)


def _look_at(container: dict[str, Any], pod: dict[str, Any], services: dict[str, Any], overlay: str) -> None:
    """A container of ours: options and variables that exist, addresses of services, nothing it need not have."""
    image = container["image"].removeprefix("kvmesh/")
    text = CliRunner().invoke(COMMANDS[image], ["--help"]).output
    known = set(re.findall(r"--[a-z-]+", text))
    assert {arg.partition("=")[0] for arg in container["args"]} <= known
    for arg in container["args"]:
        if found := re.fullmatch(r"--(?:registry|etcd)=(\w+):(\d+)", arg):
            assert int(found[2]) in {p["port"] for p in services[found[1]]["ports"]}
        if found := re.fullmatch(r"--advertise=\$\(POD_NAME\)\.(\w+)\.kvmesh\.svc:(\d+)", arg):
            assert services[found[1]]["clusterIP"] == "None"
    variables = {v["name"]: v for v in container["env"]}
    used = set(re.findall(r"\$\((\w+)\)", " ".join(container["args"])))
    assert used <= set(variables)
    prefix = {"sim": "ENGINE", "sim-kvstore": "KVSTORE"}.get(image, image.upper())
    # KV goes to peers that find the pod by its address: its name may not be known yet when it starts.
    assert ("--data-host=$(POD_IP)" in container["args"]) == (prefix in ("ENGINE", "KVSTORE"))
    own = {name for name in variables if name.startswith("KVMESH_")}
    assert all(name in re.sub(r"\s", "", text) for name in own) and all(f"KVMESH_{prefix}_" in n for n in own)
    assert pod["securityContext"]["runAsNonRoot"] and not container["securityContext"]["allowPrivilegeEscalation"]
    probes = [container[p] for p in ("startupProbe", "readinessProbe")]
    if overlay == "sim-secure":
        assert len(own) >= 3 and all("exec" in p and "grpc" not in p for p in probes)
        assert any(v.get("secret") for v in pod["volumes"])
    else:
        assert not own and all(p["grpc"]["port"] == container["ports"][0]["containerPort"] for p in probes)
