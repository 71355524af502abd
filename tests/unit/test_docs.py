"""README and docs say what is so: commands, snippets, tables, links."""

import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

from kvmesh.cli import cli

REPO = Path(__file__).parents[2]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def commands() -> list[str]:
    """Every command line that begins with `kvmesh` in any page."""
    lines = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    return sorted({line.strip() for line in lines if line.strip().startswith("kvmesh ")})


def test_the_readme_opens_with_the_two_commands():
    assert blocks(REPO / "README.md", "")[0].split("\n") == ["make demo", "make test", ""]
    assert (REPO / "README.md").read_text().index("make demo") < 40
    targets = set(re.findall(r"^([a-z]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    used = {name for page in PAGES for name in re.findall(r"`make ([a-z]+)`", page.read_text())}
    assert used | {"demo", "test"} <= targets


def test_the_strategy_in_the_readme_is_the_one_that_runs():
    (snippet,) = [block for block in blocks(REPO / "README.md", "python") if "@strategy" in block]
    assert snippet in (REPO / "services" / "router" / "strategies" / "prefill_decode.py").read_text()


def test_the_paper_s_strategies_are_those_that_run_and_short():
    page = (REPO / "docs" / "strategies.md").read_text()
    part = page[page.index("## The paper's strategies") : page.index("## One of your own")]
    shown = {re.search(r"async def (\w+)", text)[1]: text for _, text in FENCE.findall(part)}
    assert set(shown) == {"data_parallel", "prefill_decode", "balanced_prefill_decode", "context_migration"}
    for name, text in shown.items():
        assert text in (REPO / "services" / "router" / "strategies" / f"{name}.py").read_text()
        assert len(text.splitlines()) < 15, name


@pytest.mark.parametrize("line", commands())
def test_every_command_is_one_that_parses(line):
    words = shlex.split(line, comments=True)[1:]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group):
        name = words.pop(0)
        found = command.get_command(context, name)
        assert found is not None, f"no command {name}"
        command = found
    own = words[: [*words, "--"].index("--")]
    command.make_context(command.name, own)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_in_it_compiles(page):
    for block in blocks(page, "python"):
        compile(block, page.name, "exec", dont_inherit=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in heads}, target


def test_the_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("docs_tables", REPO / "scripts" / "docs_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tables = [m[1] for page in PAGES for m in re.finditer(r"<!-- table: (\w+ \w+) -->", page.read_text())]
    assert len(tables) == 13
    for page in PAGES:
        assert module.filled(page.read_text()) == page.read_text(), f"{page.name}: run `make docs`"


@pytest.mark.parametrize("service", ["Router", "Engine", "KvEndpoint", "KvPeer", "Registry"])
def test_every_call_of_the_contract_is_in_the_protocol_page(service):
    protos = "".join(p.read_text() for p in (REPO / "protos").rglob("*.proto"))
    (body,) = re.findall(rf"^service {service} {{\n(.*?)^}}", protos, re.MULTILINE | re.DOTALL)
    page = (REPO / "docs" / "protocol.md").read_text()
    names = re.findall(r"^  rpc (\w+)", body, re.MULTILINE)
    assert names and all(f"| `{name}`" in page for name in names)
    for status in set(re.findall(r"^  //   ([A-Z_]+) ", body, re.MULTILINE)):
        assert f"`{status}`: " in page


def test_an_own_strategy_as_the_page_tells_it_loads(tmp_path):
    (code,) = [b for b in blocks(REPO / "docs" / "strategies.md", "python") if b.startswith("# shortest.py")]
    (tmp_path / "shortest.py").write_text(code)
    spec = importlib.util.spec_from_file_location("shortest", tmp_path / "shortest.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.long_elsewhere.name == "long_elsewhere" and module.long_elsewhere.bind({"limit": "7"}) == {"limit": 7}
