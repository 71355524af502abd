"""The disk tier: written behind, bounded, verified on read, there again after a restart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from store_harness import BLOCK, FILE_BYTES, LAYOUT, KvNode, kv_node, prompt, until

from kvmesh.dataplane.layout import Layout
from kvmesh.errors import FailedPrecondition, InvalidArgument
from kvmesh.v1 import kvstore_pb2 as pb
from services.kvstore.disk import DiskFolder, Served

COUNT = 40


def files(folder: Path) -> list[Path]:
    return sorted((folder / "blocks").glob("*/*"))


def used(folder: Path) -> int:
    """Bytes that the blocks take of the disk."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in files(folder))


async def sent(source: KvNode, target: KvNode, tokens: list[int]) -> int:
    """Tokens that `source` gave to `target`, which did not have them."""
    ticket = await target.prepare(tokens)
    try:
        return (await source.send(tokens, ticket)).sent_tokens
    finally:
        await target.release(ticket)


async def test_what_leaves_memory_comes_back_from_disk(tmp_path: Path) -> None:
    async with kv_node("a", blocks=8, disk=tmp_path / "kv") as a, kv_node("b", blocks=200) as b:
        for key in range(COUNT):
            await a.fill(prompt(2, key), 2 * key)
        assert await a.store.flush(10)
        assert a.stats.disk_blocks == 2 * COUNT == len(files(tmp_path / "kv")) and a.stats.memory_used <= 8
        assert a.stats.evicted_blocks == 0
        for key in range(COUNT):
            tokens = prompt(2, key)
            assert await sent(a, b, tokens) == 2 * BLOCK
            assert b.content(tokens) == [2 * key, 2 * key + 1]
        assert a.stats.loaded_blocks >= 2 * COUNT - 8
        assert a.stats.memory_reserved == 0 and a.stats.locked == 0


async def test_both_bounds_hold_under_ten_times_their_size(tmp_path: Path) -> None:
    """80 blocks of memory and 200 of disk go through stores of 8 and 20."""
    folder = tmp_path / "kv"
    most = 0
    async with kv_node("a", blocks=8, disk=folder, disk_blocks=20) as a, kv_node("b", blocks=400) as b:
        seen = a.store.pool.bytes
        for key in range(100):
            await a.fill(prompt(2, key), key)
            most = max(most, used(folder))
            assert a.stats.memory_free + a.stats.memory_used + a.stats.memory_reserved == 8
            assert a.stats.disk_used_bytes <= 20 * FILE_BYTES
        assert await a.store.flush(10)
        assert used(folder) == a.stats.disk_used_bytes <= 20 * FILE_BYTES and most <= 20 * FILE_BYTES
        assert a.store.pool.bytes == seen and a.stats.disk_blocks == 20
        assert a.stats.evicted_blocks >= 200 - 28
        # The last ten prompts are there, and right.
        for key in range(90, 100):
            assert await sent(a, b, prompt(2, key)) == 2 * BLOCK
            assert b.content(prompt(2, key)) == [key, key + 1]
        assert await sent(a, b, prompt(2, 0)) == 0


async def test_what_is_told_stays_in_bounds_while_files_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    remove = DiskFolder.remove
    async with kv_node("a", blocks=16, disk=tmp_path / "kv", disk_blocks=20) as a:

        def slowly(folder: DiskFolder, keys: list[bytes]) -> None:
            told.append(a.stats.disk_used_bytes)
            remove(folder, keys)

        monkeypatch.setattr(DiskFolder, "remove", slowly)
        for key in range(20):
            await a.fill(prompt(8, key), key)
        assert await a.store.flush(10)
    assert len(told) > 5 and max(told) <= 20 * FILE_BYTES


async def test_files_that_cannot_be_removed_count_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_folder: DiskFolder, _keys: list[bytes]) -> None:
        raise OSError("not today")

    folder = tmp_path / "kv"
    async with kv_node("a", blocks=4, disk=folder, disk_blocks=8) as a:
        monkeypatch.setattr(DiskFolder, "remove", fails)
        for key in range(30):
            await a.fill(prompt(2, key), key)
        assert await a.store.flush(5)
        assert used(folder) <= a.stats.disk_used_bytes <= 8 * FILE_BYTES and a.stats.disk_errors > 0
        assert await a.match(prompt(2, 29)) == (2 * BLOCK, 2 * BLOCK)


async def test_a_restart_finds_everything(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    async with kv_node("a", disk=folder) as a:
        await a.fill(prompt(3, 1), 10)
        await a.fill(prompt(3, 2), 20, salt="t")
    async with kv_node("a", disk=folder) as a, kv_node("b") as b:
        assert a.stats.disk_blocks == 6 and a.stats.memory_used == 0
        assert await a.match(prompt(3, 1)) == (3 * BLOCK, 0)
        assert await a.match(prompt(3, 2), salt="t") == (3 * BLOCK, 0)
        assert await sent(a, b, prompt(3, 1)) == 3 * BLOCK
        assert b.content(prompt(3, 1)) == [10, 11, 12]
        assert await a.match(prompt(3, 1)) == (3 * BLOCK, 3 * BLOCK)


async def test_a_restart_with_less_room_keeps_what_was_used_last(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    async with kv_node("a", disk=folder) as a:
        for key in range(10):
            await a.fill(prompt(1, key), key)
            await a.store.flush(5)
    for at, path in enumerate(sorted(files(folder), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (1000 + at, 1000 + at))
    async with kv_node("a", disk=folder, disk_blocks=4) as a:
        await a.store.flush(5)
        assert used(folder) <= 4 * FILE_BYTES
        assert [key for key in range(10) if (await a.match(prompt(1, key)))[0]] == [6, 7, 8, 9]


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of the payload": lambda path: flip(path, 3000),
    "the last bit": lambda path: flip(path, -1),
    "a bit of the checksum": lambda path: flip(path, 60),
    "a bit of the key": lambda path: flip(path, 30),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "another block's": lambda path: path.write_bytes(
        next(p for p in path.parents[1].glob("*/*.kv") if p != path).read_bytes()
    ),
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("restarted", [True, False], ids=["before a restart", "while it runs"])
async def test_a_damaged_file_is_a_miss(tmp_path: Path, how: str, restarted: bool) -> None:
    folder = tmp_path / "kv"
    tokens = prompt(3, 1)

    def damage(node: KvNode) -> Path:
        key = node.holder.prompt(tokens, "").keys[1]
        path = folder / "blocks" / key.hex()[:2] / f"{key.hex()}.kv"
        DAMAGE[how](path)
        return path

    async with kv_node("b") as b:
        async with kv_node("a", disk=folder) as a:
            await a.fill(tokens, 10)
            await a.fill(prompt(3, 2), 50)
            await a.store.flush(5)
            if restarted:
                damage(a)
            else:
                for key in range(10, 14):
                    await a.fill(prompt(2, key), key)
                assert (await a.match(tokens))[1] == 0
                path = damage(a)
                assert await sent(a, b, tokens) == BLOCK
                assert b.content(tokens) == [10]
                assert a.stats.damaged_blocks == 1 and a.stats.locked == 0 and a.stats.memory_reserved == 0
                # The damaged file is gone, so that a new save heals it.
                await a.store.flush(5)
                assert not path.exists()
                await a.fill(tokens, 10)
                await a.store.flush(5)
                assert path.exists()
        async with kv_node("a", disk=folder) as a:
            assert await sent(a, b, tokens) == (BLOCK if restarted else 2 * BLOCK)
            assert b.content(tokens) == ([10] if restarted else [10, 11, 12])


async def test_no_disk_room_leaves_memory_working(tmp_path: Path) -> None:
    async with kv_node("a", blocks=4, disk=tmp_path / "kv", disk_blocks=2) as a:
        for key in range(10):
            await a.fill(prompt(1, key), key)
        assert await a.store.flush(5)
        # Pinned on disk: what comes now finds no room there, and stays in memory only.
        for key in (8, 9):
            await a.call(a.admin.Pin, pb.PinRequest(token_ids=prompt(1, key), end=BLOCK))
        for key in range(20, 30):
            await a.fill(prompt(1, key), key)
        assert await a.store.flush(5)
        assert a.stats.disk_blocks == 2
        assert [key for key in range(30) if (await a.match(prompt(1, key)))[0]] == [8, 9, 26, 27, 28, 29]


async def test_a_disk_that_fails_leaves_memory_working(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    async with kv_node("a", blocks=4, disk=folder) as a:
        # A file where a folder has to be: writing fails for whoever runs the test.
        for entry in (folder / "blocks").iterdir():
            entry.rmdir()
        (folder / "blocks").rmdir()
        (folder / "blocks").write_text("")
        for key in range(10):
            await a.fill(prompt(2, key), key)
        assert await a.store.flush(5)
        assert a.stats.disk_errors > 0 and a.stats.disk_blocks == 0 and a.stats.disk_used_bytes == 0
        assert await a.match(prompt(2, 9)) == (2 * BLOCK, 2 * BLOCK)


async def test_two_readers_of_one_block_read_it_once(tmp_path: Path) -> None:
    tokens = prompt(4, 1)
    async with kv_node("a", disk=tmp_path / "kv") as a:
        await a.fill(tokens, 10)
    async with kv_node("a", disk=tmp_path / "kv") as a, kv_node("b") as b, kv_node("c") as c:
        assert await asyncio.gather(sent(a, b, tokens), sent(a, c, tokens)) == [4 * BLOCK] * 2
        assert a.stats.loaded_blocks == 4
        assert b.content(tokens) == c.content(tokens) == [10, 11, 12, 13]
        await until(lambda: a.stats.locked == 0)
        assert a.stats.memory_used == 4 and a.stats.memory_reserved == 0


async def test_a_chain_longer_than_half_of_memory_comes_in_part(tmp_path: Path) -> None:
    tokens = prompt(12, 1)
    async with kv_node("a", blocks=16, disk=tmp_path / "kv") as a:
        await a.fill(tokens, 10)
    async with kv_node("a", blocks=8, disk=tmp_path / "kv") as a, kv_node("b", blocks=16) as b:
        assert await sent(a, b, tokens) == 4 * BLOCK
        assert b.content(tokens) == [10, 11, 12, 13]


async def test_evicting_removes_files(tmp_path: Path) -> None:
    async with kv_node("a", disk=tmp_path / "kv") as a:
        await a.fill(prompt(3, 1), 10)
        await a.store.flush(5)
        evicted = await a.call(a.admin.Evict, pb.EvictRequest(token_ids=prompt(3, 1), begin=BLOCK))
        assert evicted.evicted == 2 * BLOCK
        await a.store.flush(5)
        assert len(files(tmp_path / "kv")) == 1 and a.stats.disk_used_bytes == FILE_BYTES


def test_a_folder_is_for_one_store_and_one_model(tmp_path: Path) -> None:
    folder = DiskFolder(str(tmp_path / "kv"), 1 << 20)
    served = Served(LAYOUT, "toy", "/models/toy", 1000, 4096)
    try:
        assert folder.served() is None
        folder.claim(served)
        assert folder.served() == served
        with pytest.raises(FailedPrecondition, match="in use by another store"):
            DiskFolder(str(tmp_path / "kv"), 1 << 20)
    finally:
        folder.close()
    again = DiskFolder(str(tmp_path / "kv"), 1 << 20)
    try:
        other = Layout("11" * 16, "float32", layers=2, heads=2, k_dim=8, v_dim=8, page_size=1)
        with pytest.raises(FailedPrecondition, match=r"holds the KV of toy in another layout.*model_digest"):
            again.claim(Served(other, "toy2", "", 0, 0))
        (tmp_path / "kv" / "store.json").write_text("{}")
        with pytest.raises(InvalidArgument, match="cannot be read"):
            again.served()
    finally:
        again.close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgument, match="cannot be used"):
        DiskFolder(str(tmp_path / "file"), 1 << 20)


async def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    async with kv_node("a", disk=folder) as a:
        await a.fill(prompt(1, 1), 10)
    path = files(folder)[0]
    (path.parent / "notes.txt").write_text("mine")
    (path.parent / f"{'ab' * 16}.tmp").write_text("half a block")
    async with kv_node("a", disk=folder) as a:
        assert a.stats.disk_blocks == 1
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "notes.txt"])
