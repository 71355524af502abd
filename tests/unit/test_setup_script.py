"""scripts/setup.py: what it calls the same environment, what it never removes, and how it fails."""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "setup.py"
KEY = "0123456789abcdef"


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("setup_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(*extra: str) -> dict:
    return {
        "build-system": {"requires": ["setuptools>=77"]},
        "project": {
            "name": "kvmesh",
            "dependencies": ["click>=8.1"],
            "optional-dependencies": {"engine": ["sglang==0.5.17"], "all": ["kvmesh[engine]", *extra]},
        },
    }


def test_all_requirements_are_taken_but_the_project_itself(setup):
    assert setup.requirements(project("ruff")) == ["click>=8.1", "ruff", "setuptools>=77", "sglang==0.5.17"]


def test_the_key_changes_with_requirements_and_python_and_with_nothing_else(setup, monkeypatch):
    key = setup.dependency_key(project())
    assert len(key) == 16 and key == setup.dependency_key({**project(), "tool": {"ruff": {}}})
    assert key != setup.dependency_key(project("ruff"))
    monkeypatch.setattr(sys, "version", "3.99")
    assert key != setup.dependency_key(project())


def test_the_repository_itself_has_a_key(setup):
    assert any(r.startswith("sglang==") for r in setup.requirements(setup.read_project()))


def test_a_half_built_environment_is_removed(setup, tmp_path, capsys):
    target = tmp_path / KEY
    (target / "lib" / "deep").mkdir(parents=True)
    (target / "link").symlink_to(tmp_path)
    (target / setup.MINE).write_text(f"{target}\n")
    (tmp_path / "precious").touch()
    setup.discard(target, tmp_path)
    assert os.listdir(tmp_path) == ["precious"] and "half-built" in capsys.readouterr().out
    setup.discard(target, tmp_path)


@pytest.mark.parametrize("case", ["unmarked", "other mark", "name", "elsewhere", "link", "around"])
def test_anything_else_in_its_place_is_refused(setup, tmp_path, monkeypatch, capsys, case):
    venvs = tmp_path / "venvs"
    target = venvs / ("my-things" if case == "name" else KEY)
    (target / "precious").mkdir(parents=True)
    mark = {"unmarked": "", "other mark": "/elsewhere\n"}.get(case, f"{target}\n")
    (target / setup.MINE).write_text(mark)
    if case == "link":
        os.rename(target, tmp_path / "real")
        target.symlink_to(tmp_path / "real")
    if case == "around":
        monkeypatch.chdir(target / "precious")
    with pytest.raises(SystemExit):
        setup.discard(target, tmp_path if case == "elsewhere" else venvs)
    assert (target / "precious").is_dir() and "was not made here" in capsys.readouterr().err


def test_a_whole_environment_is_used_as_it_is(setup, tmp_path):
    (tmp_path / KEY).mkdir()
    (tmp_path / KEY / setup.WHOLE).touch()
    assert setup.dependency_venv(project(), tmp_path, KEY) == tmp_path / KEY
    assert os.listdir(tmp_path) == [KEY]


def test_two_at_once_build_one(setup, tmp_path, monkeypatch):
    built = []
    begun = threading.Event()

    def build(names, target):
        begun.set()
        built.append(target)
        target.mkdir()
        (target / setup.WHOLE).touch()

    monkeypatch.setattr(setup, "build", build)
    with setup.locked(tmp_path / f"{KEY}.lock"):
        threads = [threading.Thread(target=setup.dependency_venv, args=(project(), tmp_path, KEY)) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert not begun.wait(0.2)
    for thread in threads:
        thread.join(10)
    assert built == [tmp_path / KEY]


def test_a_build_that_fails_says_why_and_is_not_taken_for_whole(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SystemExit):
        setup.dependency_venv(project("kvmesh-no-such-thing==9"), tmp_path, KEY)
    err = capsys.readouterr().err
    assert "installing failed with status 1" in err and str(tmp_path / f"{KEY}.log") in err
    assert "No matching distribution found" in err and "pip config list" in err
    assert (tmp_path / KEY / setup.MINE).is_file() and not (tmp_path / KEY / setup.WHOLE).exists()
    setup.discard(tmp_path / KEY, tmp_path)
    assert not (tmp_path / KEY).exists()


def test_too_little_room_is_told_before_anything_is_done(setup, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "NEEDED_GB", 10**9)
    with pytest.raises(SystemExit):
        setup.build(["x"], tmp_path / KEY)
    assert "XDG_CACHE_HOME names another place" in capsys.readouterr().err and os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_a_venv_of_another_python_that_was_not_made_here_stays(setup, tmp_path, monkeypatch, capsys, kind):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "precious").touch()
    venv = tmp_path / ".venv"
    if kind == "link":
        venv.symlink_to(mine)
        (mine / setup.MINE).write_text(f"{venv}\n")
    else:
        mine.rename(venv)
    monkeypatch.setattr(setup, "VENV", venv)
    with pytest.raises(SystemExit):
        setup.empty_venv(tmp_path / "log")
    assert (venv / "precious").exists() and "move it away" in capsys.readouterr().err


def test_an_old_python_is_told_what_to_do(setup, monkeypatch, capsys):
    monkeypatch.setattr(setup, "OLDEST", (99, 0))
    with pytest.raises(SystemExit):
        setup.main()
    assert "Python 99.0 or newer is needed" in capsys.readouterr().err


def test_a_cache_that_is_not_absolute_is_not_taken(setup, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert setup.cache_home() == Path.home() / ".cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert setup.cache_home() == Path("/x")


def test_it_needs_no_package(tmp_path):
    code = f"import runpy; runpy.run_path({str(SCRIPT)!r})"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd=tmp_path, timeout=30)
