"""What kvmesh.local removes, and above all what it does not."""

import os
import tempfile
from pathlib import Path

import pytest

from kvmesh.local import scratch
from kvmesh.local.scratch import MARKER, Refused


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A mesh folder; the current folder is another one, with something in it to lose."""
    # Short enough for root/work whatever the name of the test.
    folder = Path(tempfile.mkdtemp(prefix="kvm", dir="/tmp"))
    here = tmp_path / "here"
    (here / "precious").mkdir(parents=True)
    (here / "precious" / "file").write_text("x")
    monkeypatch.chdir(here)
    yield folder
    assert (here / "precious" / "file").read_text() == "x"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def test_what_was_made_is_removed_and_nothing_beside_it(root):
    (root / "keep").write_text("x")
    work = scratch.make(root)
    (work / "engine-0" / "deep").mkdir(parents=True)
    (work / "engine-0" / "deep" / "file").touch()
    (work / "note").touch()
    scratch.remove(work, root)
    assert [p.name for p in root.iterdir()] == ["keep"]
    scratch.remove(work, root)


def test_making_again_empties_it(root):
    work = scratch.make(root)
    (work / "old").touch()
    assert scratch.make(root) == work
    assert [p.name for p in work.iterdir()] == [MARKER]


@pytest.mark.parametrize(
    "path", ["", ".", "..", "precious", "./precious", "/", "/tmp", "/work", "~", "/tmp/kvmesh-", "/gone/work"]
)
def test_a_path_that_is_not_a_work_folder_is_refused(root, path):
    with pytest.raises(Refused, match="will not remove"):
        scratch.remove(Path(path), root)
    with pytest.raises(Refused):
        scratch.remove_inside(Path(path), root, "precious")


def test_the_current_folder_and_those_around_it_are_refused_even_when_marked(root, monkeypatch):
    work = scratch.make(root)
    (work / "inner").mkdir()
    for here in (work, work / "inner"):
        monkeypatch.chdir(here)
        with pytest.raises(Refused, match="around the current folder"):
            scratch.remove(work, root)
    assert (work / "inner").is_dir()


def test_an_unmarked_folder_in_the_right_place_is_refused(root):
    (root / "work" / "mine").mkdir(parents=True)
    for attempt in (lambda: scratch.remove(root / "work", root), lambda: scratch.make(root)):
        with pytest.raises(Refused, match="not marked"):
            attempt()
    assert (root / "work" / "mine").is_dir()


def test_the_work_folder_of_another_mesh_is_refused(root):
    work = scratch.make(root)
    with pytest.raises(Refused, match="neither"):
        scratch.remove(work, root.parent / "other")
    (work / MARKER).write_text("/elsewhere\n")
    with pytest.raises(Refused, match="not marked as made for"):
        scratch.remove(work, root)
    assert work.is_dir()


def test_links_are_never_followed(root, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "file").write_text("x")
    work = scratch.make(root)
    (work / "engine-0").symlink_to(target)
    (work / "engine-1").mkdir()
    (work / "engine-1" / "link").symlink_to(target)
    scratch.remove(work, root)
    assert (target / "file").read_text() == "x"
    (target / MARKER).write_text(f"{root}\n")
    (root / "work").symlink_to(target)
    with pytest.raises(Refused, match="no folder of its own"):
        scratch.remove(root / "work", root)
    assert (target / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "/etc", MARKER])
def test_a_name_that_is_a_path_is_refused(root, name):
    work = scratch.make(root)
    with pytest.raises(Refused, match="no name of a process"):
        scratch.remove_inside(work, root, name)
    assert (work / MARKER).is_file()


def test_one_process_folder_is_removed_alone(root):
    work = scratch.make(root)
    for name in ("engine-0", "engine-1"):
        (work / name).mkdir()
    scratch.remove_inside(work, root, "engine-0")
    assert sorted(p.name for p in work.iterdir()) == [MARKER, "engine-1"]
    scratch.remove_inside(work, root, "engine-0")


def test_a_relative_mesh_folder_is_refused(root):
    with pytest.raises(Refused, match="not absolute"):
        scratch.make(Path("here"))
    assert sorted(os.listdir()) == ["precious"]


def test_a_long_place_is_replaced_by_a_short_one_that_is_removed_too(tmp_path):
    root = tmp_path / ("x" * 80)
    root.mkdir()
    work = scratch.make(root)
    assert len(str(work)) <= scratch.LONGEST and work.parent == Path("/tmp")
    scratch.remove(work, root)
    assert not work.exists() and root.is_dir()
