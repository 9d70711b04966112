from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formation.core.errors import DecodeError, UsageError
from formation.pack.cpio import CpioEntry, directory, read_cpio, regular_file, symbolic_link, with_parents, write_cpio
from formation.pack.formfile import decode_formfile, parse_formfile
from formation.pack.formfile_directives import DIRECTIVES
from formation.pack.manifest import parse_manifest


def mistake_of(read: Callable[[], object]) -> UsageError | None:
    """What is wrong with a text, if anything; other exceptions go through."""
    try:
        read()
    except UsageError as error:
        return error
    return None


_words = st.sampled_from(
    [
        *DIRECTIVES,
        "web",
        "busybox",
        "/www",
        "..",
        "80/tcp",
        "--scope=user:x",
        "A=b",
        "'",
        '"',
        "\\",
        "[",
        '["a"]',
        "#",
        "username:a",
        "passwd:x",
        "512",
    ]
) | st.text(max_size=8)
_lines = st.lists(_words, max_size=6).map(" ".join)


@given(
    st.text()
    | st.lists(_lines, max_size=12).map("\n".join)
    | st.lists(_lines, max_size=8).map(lambda x: "NAME a\nFROM b\n" + "\n".join(x))
)
@settings(max_examples=300, deadline=None)
def test_any_text_parses_or_is_a_usage_error_with_a_place(text: str) -> None:
    """The parser raises nothing but UsageError, which names line and column, and has a hint."""
    error = mistake_of(lambda: parse_formfile(text, path="F"))
    if error is not None:
        path, line, column, _ = error.message.split(":", 3)
        assert path == "F"
        assert int(line) >= 1
        assert int(column) >= 1
        assert error.hint


@given(st.binary(max_size=200))
def test_any_bytes_decode_or_are_a_usage_error(data: bytes) -> None:
    """Decoding raises nothing but UsageError."""
    error = mistake_of(lambda: decode_formfile(data, path="F"))
    assert error is None or error.message.startswith("F:")


@given(st.binary(max_size=400))
def test_any_bytes_are_a_manifest_or_a_decode_error(data: bytes) -> None:
    """Nothing that a peer sends as a manifest raises anything but DecodeError."""
    with pytest.raises(DecodeError):
        parse_manifest(data)


_part = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(
    lambda part: part not in (".", "..")
)
_name = st.lists(_part, min_size=1, max_size=3).map("/".join)
_entries = st.dictionaries(_name, st.binary(max_size=40), max_size=6).map(
    lambda files: tuple(regular_file(name, data, 0o755) for name, data in files.items())
)


@given(_entries, _entries)
def test_reading_gives_what_was_written(first: tuple[CpioEntry, ...], second: tuple[CpioEntry, ...]) -> None:
    """An archive reads back as its entries, also when two are concatenated; its size is a multiple of four."""
    data = write_cpio(first)
    assert len(data) % 4 == 0
    assert read_cpio(data + write_cpio(second)) == first + second


@given(_entries)
def test_parents_come_first(entries: tuple[CpioEntry, ...]) -> None:
    """Every entry's folder stands before it."""
    seen: set[str] = set()
    for entry in with_parents(entries):
        parent = entry.name.rpartition("/")[0]
        assert not parent or parent in seen
        seen.add(entry.name)


@pytest.mark.skipif(shutil.which("bsdtar") is None and shutil.which("cpio") is None, reason="needs cpio or bsdtar")
def test_others_read_what_we_write() -> None:
    """The cpio program lists the entries of our archive."""
    data = write_cpio((directory("d"), regular_file("d/f", b"x" * 5), symbolic_link("d/l", "f")))
    command = ["cpio", "-t", "--quiet"] if shutil.which("cpio") else ["bsdtar", "-tf", "-"]
    listed = subprocess.run(command, input=data, capture_output=True, check=True).stdout.decode().split()
    assert [name.rstrip("/") for name in listed] == ["d", "d/f", "d/l"]
    assert stat.S_ISLNK(read_cpio(data)[2].mode)
