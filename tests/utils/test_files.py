import os
import resource
import stat

import pytest

from rt_detectron.utils.errors import InputError
from rt_detectron.utils.files import (
    cache_folder,
    find_config,
    json_lines,
    read_json,
    replaced_atomically,
    shipped,
    write_text,
)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe"])
def test_a_damaged_file_of_ours_is_told_and_made_again(tmp_path, content, caplog):
    path = tmp_path / "result.json"
    assert read_json(path) is None
    assert not caplog.text
    path.write_bytes(content)
    assert read_json(path) is None
    assert f"{path} is damaged: it is made again" in caplog.text
    path.write_text('{"AP": 1}')
    assert read_json(path) == {"AP": 1}


def test_lines_that_a_killed_process_left_incomplete_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(FileNotFoundError):
        list(json_lines(path))
    path.write_bytes(b'{"a": 1}\n{"a"\n[2]\n\n\xff\n{"a": 3}\n{"a": 4')
    assert list(json_lines(path)) == [{"a": 1}, {"a": 3}]


def test_shipped_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = str(shipped("configs") / "robust_r50_eps3.yaml")
    assert find_config("robust_r50_eps3.yaml") == find_config("configs/robust_r50_eps3.yaml") == expected
    assert find_config("mine.yaml") == "mine.yaml"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "robust_r50_eps3.yaml").write_text("MODEL: {}")
    assert find_config("robust_r50_eps3.yaml") == "robust_r50_eps3.yaml"


def test_temporary_files_of_hosts_with_the_same_process_number_differ(tmp_path):
    path = tmp_path / "file"
    with replaced_atomically(path) as first, replaced_atomically(path) as second:
        assert first != second
        for temporary in (first, second):
            with open(temporary, "w") as file:
                file.write("whole")
    assert os.listdir(tmp_path) == ["file"]


def test_failed_write_keeps_the_old_file(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "a", "new \ud800")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_text(tmp_path / "a", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.filename == str(tmp_path / "a")
    assert not os.listdir(tmp_path)


class TestCacheFolder:
    @pytest.fixture(autouse=True)
    def home(self, tmp_path, monkeypatch):
        for name in ("RT_DETECTRON_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))

    def test_where_it_is(self, tmp_path, monkeypatch):
        assert cache_folder("zoo") == str(tmp_path / ".cache" / "rt_detectron" / "zoo")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_folder("zoo") == str(tmp_path / "xdg" / "rt_detectron" / "zoo")
        monkeypatch.setenv("RT_DETECTRON_CACHE", "~/own")
        assert cache_folder("zoo") == str(tmp_path / "own" / "zoo")

    def test_it_is_its_owners_alone(self, tmp_path):
        before = os.umask(0)
        try:
            folder = cache_folder("zoo")
        finally:
            os.umask(before)
        for path in (folder, os.path.dirname(folder)):
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o700

    @pytest.mark.parametrize("mode", [0o777, 0o775, 0o757, 0o1777])
    def test_one_that_others_may_write_to_is_refused(self, tmp_path, monkeypatch, mode):
        monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "shared"))
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared").chmod(mode)
        with pytest.raises(InputError, match=r"others may write to the cache .*: run `chmod go-w .*shared`"):
            cache_folder("zoo")
        (tmp_path / "shared").chmod(0o755)
        assert cache_folder("zoo") == str(tmp_path / "shared" / "zoo")

    def test_another_users_is_refused(self, tmp_path, monkeypatch):
        (tmp_path / "theirs").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "theirs")
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        for name in ("theirs", "link"):
            monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / name))
            with pytest.raises(InputError, match=r"theirs belongs to another user: set RT_DETECTRON_CACHE"):
                cache_folder("zoo")

    def test_without_a_home_none_is_made_in_a_folder_called_tilde(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # HOME is not set, the user is unknown
        with pytest.raises(InputError, match=r"no home folder for the cache ~/\.cache/rt_detectron: set"):
            cache_folder("zoo")
        assert not os.listdir(tmp_path)

    def test_there_is_no_fallback(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RT_DETECTRON_CACHE", str(tmp_path / "file"))
        with pytest.raises(InputError, match=r"cannot make the cache .*: set RT_DETECTRON_CACHE to a folder"):
            cache_folder("zoo")
        assert os.listdir(tmp_path) == ["file"]
