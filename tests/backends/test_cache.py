"""The disk cache: hits, damage, several processes at once. Packages here are a few bytes: the cache never looks in."""

import json
import subprocess
import sys

from mlopt.backends.inductor.cache import DiskCache, default_directory, machine

KEY = "ab" * 32


def put(cache, contents=b"package", key=KEY):
    path = cache.new_package()
    path.write_bytes(contents)
    return cache.put(key, path, ("x0 <= 8",), 1.5)


def test_entries_come_back(tmp_path):
    cache = DiskCache(tmp_path)
    assert cache.get(KEY) is None
    entry = put(cache)
    assert cache.get(KEY) == entry and entry.path.read_bytes() == b"package" and entry.guards == ("x0 <= 8",)
    assert DiskCache(tmp_path).get(KEY) == entry
    assert cache.get("cd" * 32) is None


def test_damage_is_noticed(tmp_path, caplog):
    cache = DiskCache(tmp_path)
    record = cache.directory / f"{KEY}.json"
    damages = [
        lambda path: path.write_bytes(b"pack"),
        lambda path: path.write_bytes(b"package "),
        lambda path: record.write_text("{"),
        lambda path: record.write_text("[]"),
        lambda path: record.write_text("{}"),
        lambda path: record.write_text(json.dumps({"package": path.name, "guards": 3, "seconds": 1})),
    ]
    for damage in damages:
        caplog.clear()
        damage(put(cache).path)
        assert cache.get(KEY) is None
        assert "is damaged and is compiled again" in caplog.text
        assert cache.get(KEY) is None  # and stays so until it is
        assert put(cache) == cache.get(KEY)
    put(cache).path.unlink()
    assert cache.get(KEY) is None


def test_choices(tmp_path):
    cache = DiskCache(tmp_path)
    assert cache.get_choice(KEY) is None
    cache.put_choice(KEY, "eager", "a call: 1 us eager, 2 us compiled")
    assert cache.get_choice(KEY) == ("eager", "a call: 1 us eager, 2 us compiled")
    (cache.directory / f"{KEY}.choice").write_text("3")
    assert cache.get_choice(KEY) is None


WRITER = """
import sys
from mlopt.backends.inductor.cache import DiskCache
cache = DiskCache(sys.argv[1])
for k in range(200):
    path = cache.new_package()
    path.write_bytes(sys.argv[2].encode() * (k + 1))
    cache.put("ab" * 32, path, (), float(k))
    entry = cache.get("ab" * 32)
    assert entry is not None, k
    assert len(set(entry.path.read_bytes())) == 1
"""


def test_processes_that_write_one_entry_at_once_leave_a_whole_one(tmp_path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), letter]) for letter in "xy"]
    assert [w.wait(120) for w in writers] == [0, 0]
    cache = DiskCache(tmp_path)
    assert cache.get(KEY) is not None
    assert not list(cache.directory.glob("new-*"))


def test_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("MLOPT_CACHE_DIR", str(tmp_path / "here"))
    assert default_directory() == tmp_path / "here"
    assert not (tmp_path / "here").exists()  # looking something up makes nothing
    DiskCache(None).get(KEY)
    assert not (tmp_path / "here").exists()
    monkeypatch.delenv("MLOPT_CACHE_DIR")
    assert default_directory().parts[-2:] == (".cache", "mlopt")
    assert machine() == machine() and len(machine()) > 10
