import errno
import threading

import pytest

from slm.data.cache import build_once, cache_folder
from slm.errors import DataError


def test_cache_folder_prefers_the_setting_then_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SLM_CACHE", str(tmp_path / "environment"))
    assert cache_folder(str(tmp_path / "setting")) == tmp_path / "setting"
    assert cache_folder(None) == tmp_path / "environment"
    monkeypatch.delenv("SLM_CACHE")
    assert cache_folder(None).parts[-2:] == (".cache", "slm")


def test_builds_once_when_several_start_together(tmp_path):
    folder, builds, barrier = tmp_path / "deep" / "entry", [], threading.Barrier(4)
    seen_whole = []

    def build(temporary):
        builds.append(temporary)
        (temporary / "a").write_text("1")
        threading.Event().wait(0.05)  # gives the others time to go wrong
        (temporary / "b").write_text("2")

    def start():
        barrier.wait()
        build_once(folder, build)
        seen_whole.append((folder / "a").is_file() and (folder / "b").is_file())

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1
    assert seen_whole == [True] * 4


def test_a_killed_build_leaves_nothing_behind(tmp_path):
    leftover = tmp_path / "entry.tmp-12345"
    leftover.mkdir()
    (leftover / "half").write_text("x")
    build_once(tmp_path / "entry", lambda temporary: (temporary / "whole").write_text("y"))
    assert not leftover.exists()
    assert [path.name for path in (tmp_path / "entry").iterdir()] == ["whole"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_clear_error_and_destroys_nothing(tmp_path, number):
    kept = tmp_path / "other"
    build_once(kept, lambda temporary: (temporary / "file").write_text("kept"))

    def build(temporary):
        (temporary / "half").write_text("x")
        raise OSError(number, "No space left on device")

    with pytest.raises(DataError, match=r"disk full .*entry.*data\.cache"):
        build_once(tmp_path / "entry", build)
    assert not list(tmp_path.glob("entry")) + list(tmp_path.glob("entry.tmp-*"))
    assert (kept / "file").read_text() == "kept"


def test_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        build_once(tmp_path / "cache" / "entry", lambda temporary: None)
    assert (tmp_path / "cache").read_text() == "in the way"
