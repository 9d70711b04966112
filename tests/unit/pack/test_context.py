from __future__ import annotations

import os
from pathlib import Path

import pytest

from formation.core.errors import UsageError
from formation.pack.context import read_context, read_small_file
from formation.pack.plan import ContextFile


def everything(_: str) -> bool:
    return True


def read(folder: Path) -> dict[str, ContextFile]:
    return {f.path: f for f in read_context(folder, formfile_path=folder / "Formfile", wanted=everything)}


def test_files_folders_and_inner_links_are_read(tmp_path: Path) -> None:
    """A context gives its files with content and executable bit, its folders, and links that stay inside."""
    (tmp_path / "Formfile").write_text("NAME a\nUSER username:a passwd:secret\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "run").write_bytes(b"x")
    (tmp_path / "a" / "run").chmod(0o4711)
    (tmp_path / "a" / "link").symlink_to("../b")
    (tmp_path / "b").write_bytes(b"y")
    found = read(tmp_path)
    assert sorted(found) == ["a", "a/link", "a/run", "b"]
    assert (found["a"].kind, found["a/run"].executable, found["b"].executable) == ("directory", True, False)
    assert (found["a/link"].kind, found["a/link"].data) == ("link", b"../b")


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "a/../../outside", ".."])
def test_a_link_that_leads_out_is_refused(tmp_path: Path, target: str) -> None:
    """A link to anything outside of the context is an error, never followed."""
    (tmp_path / "l").symlink_to(target)
    with pytest.raises(UsageError, match="l in the build context is a link that leads out of it"):
        read(tmp_path)


def test_a_folder_that_is_a_link_is_not_entered(tmp_path: Path) -> None:
    """What lies behind a link is not part of the context, even inside."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "f").write_bytes(b"1")
    (tmp_path / "alias").symlink_to("real")
    assert sorted(read(tmp_path)) == ["alias", "real", "real/f"]


def test_a_pipe_is_refused_without_opening_it(tmp_path: Path) -> None:
    """A pipe in the context is an error and does not block the build."""
    os.mkfifo(tmp_path / "p")
    with pytest.raises(UsageError, match="p in the build context is a device, pipe or socket"):
        read(tmp_path)
    with pytest.raises(UsageError, match="is not a file"):
        read_small_file(tmp_path / "p", size_max_bytes=10)


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    """A file name that is not UTF-8 is an error."""
    (tmp_path / os.fsdecode(b"bad\xff")).write_bytes(b"")
    with pytest.raises(UsageError, match="no UTF-8"):
        read(tmp_path)


def test_formignore_hides(tmp_path: Path) -> None:
    """Patterns without a slash hold against names anywhere, those with one against paths; folders are hidden whole."""
    for name in ("a.log", "sub/b.log", "sub/keep", "node_modules/x/y", "docs/draft.md", "deep/docs/draft.md"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / ".formignore").write_text("# logs\n*.log\nnode_modules/\n/docs/*.md\n")
    assert sorted(read(tmp_path)) == ["deep", "deep/docs", "deep/docs/draft.md", "docs", "sub", "sub/keep"]


def test_an_exception_in_formignore_is_told(tmp_path: Path) -> None:
    """What we do not support is an error with its place."""
    (tmp_path / ".formignore").write_text("*.log\n!keep.log\n")
    with pytest.raises(UsageError, match=r"\.formignore:2:1: expected a pattern, found an exception"):
        read(tmp_path)


def test_a_missing_formfile_is_told(tmp_path: Path) -> None:
    """No Formfile is the caller's mistake, with a hint."""
    with pytest.raises(UsageError, match="no Formfile in"):
        read_small_file(tmp_path / "Formfile", size_max_bytes=10)
