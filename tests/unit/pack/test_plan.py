from __future__ import annotations

import pytest

from formation.core.errors import UsageError
from formation.pack.cpio import CpioEntry, read_cpio
from formation.pack.formfile import parse_formfile
from formation.pack.plan import BuildPlan, ContextFile, build_layer, is_wanted, plan_build, plan_digest

HEAD = "NAME web\nFROM busybox\n"
FILES = (
    ContextFile(path="app.conf", kind="file", data=b"conf"),
    ContextFile(path="www", kind="directory"),
    ContextFile(path="www/index.html", kind="file", data=b"page"),
    ContextFile(path="www/run", kind="file", data=b"#!/bin/sh", executable=True),
    ContextFile(path="www/latest", kind="link", data=b"index.html"),
)


def plan_of(text: str) -> BuildPlan:
    return plan_build(parse_formfile(HEAD + text, path="Formfile"))


def layer_of(text: str, files: tuple[ContextFile, ...] = FILES) -> dict[str, CpioEntry]:
    return {entry.name: entry for entry in read_cpio(build_layer(plan_of(text), files))}


def test_copy_of_a_folder_takes_what_is_in_it() -> None:
    """COPY of a folder puts its content into the target, with links, and with two modes only."""
    layer = layer_of("COPY www /srv/site\n")
    assert layer["image/srv/site/index.html"].data == b"page"
    assert oct(layer["image/srv/site/index.html"].mode) == "0o100644"
    assert oct(layer["image/srv/site/run"].mode) == "0o100755"
    assert oct(layer["image/srv/site/latest"].mode) == "0o120777"
    assert oct(layer["image/srv"].mode) == "0o40755"
    assert "image/srv/site/app.conf" not in layer


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("COPY app.conf /etc/app.conf", "image/etc/app.conf"),
        ("COPY app.conf /etc/", "image/etc/app.conf"),
        ("COPY app.conf /", "image/app.conf"),
        ("COPY . /all", "image/all/www/index.html"),
        ("COPY . /", "image/www/index.html"),
        ("COPY www/run /bin/run", "image/bin/run"),
    ],
)
def test_copy_targets(line: str, name: str) -> None:
    """A file becomes its target, or goes into one that ends with a slash; `.` is the whole context."""
    assert name in layer_of(line + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("COPY nothing /x\n", "Formfile:3:6: expected 'nothing' in the build context, found none"),
        ("COPY app.conf /x\nCOPY www /x\n", "Formfile:4:6: expected /x to be a file or a directory, not both"),
        ("COPY app.conf /x\nCOPY www /x/y\n", "Formfile:4:6: expected /x to be a file or a directory, not both"),
    ],
)
def test_copies_that_cannot_be_are_told_with_their_place(text: str, message: str) -> None:
    """A COPY without source, or onto something of another kind, names its line."""
    with pytest.raises(UsageError) as caught:
        layer_of(text)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "RUN make\n", "F:3:1: RUN comes with a later version"),
        (HEAD + "INSTALL nginx\n", "F:3:1: INSTALL comes with a later version"),
        (HEAD + "GPU A100\n", "F:3:1: GPU comes with a later version"),
        ("NAME web\nFROM debian:bookworm\n", "F:2:6: FROM debian:bookworm comes with a later version"),
        (HEAD + "ENV --scope=service:db A=1\n", "F:3:24: expected service:web, the only service of this image"),
    ],
)
def test_what_can_not_be_built_yet_is_refused_at_its_place(text: str, message: str) -> None:
    """Nothing that parses is ignored by the builder: it says what it can not do, and where that stands."""
    with pytest.raises(UsageError) as caught:
        plan_build(parse_formfile(text, path="F"))
    assert caught.value.message == message
    assert caught.value.hint


def test_users_and_variables_become_files() -> None:
    """USER and ENV give rows of passwd, group and shadow, homes of their owners, and exports that are quoted."""
    layer = layer_of(
        "USER username:ada passwd:secret groups:web sudo:on ssh_authorized_keys:'ssh-ed25519 AAAA me'\n"
        'USER username:bob\nENV GREETING="it\'s"\nENV --scope=user:ada EDITOR=vi\n'
    )
    passwd = layer["image/etc/passwd"].data.decode()
    assert "root:x:0:0:root:/root:/bin/sh\n" in passwd
    assert "ada:x:1000:1000:ada:/home/ada:/bin/sh\nbob:x:1001:1001:bob:/home/bob:/bin/sh\n" in passwd
    shadow = layer["image/etc/shadow"]
    assert b"\nada:$6$" in shadow.data
    assert b"\nbob:!:19000:" in shadow.data
    assert oct(shadow.mode) == "0o100600"
    assert b"sudo:x:27:ada\n" in layer["image/etc/group"].data
    assert b"web:x:2000:ada\n" in layer["image/etc/group"].data
    assert layer["image/etc/profile.d/formation.sh"].data == b"export GREETING='it'\"'\"'s'\n"
    assert layer["image/home/ada/.profile"].data == b"export EDITOR=vi\n"
    keys = layer["image/home/ada/.ssh/authorized_keys"]
    assert (keys.data, keys.owner_id, oct(keys.mode)) == (b"ssh-ed25519 AAAA me\n", 1000, "0o100600")
    assert not any(b"secret" in entry.data for entry in layer.values())


def test_users_are_added_to_an_image_s_own_tables() -> None:
    """A passwd that COPY brings keeps its rows; new users get free numbers; a malformed one is refused."""
    own = (ContextFile(path="passwd", kind="file", data=b"root:x:0:0::/root:/bin/sh\nold:x:1004:1004::/old:/bin/sh\n"),)
    layer = layer_of("COPY passwd /etc/passwd\nUSER username:ada\n", own)
    assert b"\nold:x:1004:1004::/old:/bin/sh\nada:x:1005:1005:" in layer["image/etc/passwd"].data
    bad = (ContextFile(path="passwd", kind="file", data=b"nonsense\n"),)
    with pytest.raises(UsageError, match="is not a row of it"):
        layer_of("COPY passwd /etc/passwd\nUSER username:ada\n", bad)


def test_the_guest_is_told_by_data() -> None:
    """Entrypoint and environment are NUL-terminated; service variables are the service's only."""
    layer = layer_of(
        'ENV A=1\nENV --scope=service:web B=\'x y\'\nWORKDIR /srv\nEXPOSE 80 53/udp\nENTRYPOINT ["a b", "", "c\\nd"]\n'
    )
    assert layer["formation/image/entrypoint"].data == b"a b\0\0c\nd\0"
    assert layer["formation/image/env"].data == b"A=1\0B=x y\0"
    assert layer["formation/image/workdir"].data == b"/srv\0"
    assert layer["formation/image/expose"].data == b"tcp 80 0050\nudp 53 0035\n"
    assert layer["formation/image/lower"].data == b"/image:/base\n"
    assert "image/srv" in layer
    assert b"B=" not in layer["image/etc/profile.d/formation.sh"].data


def test_scratch_stands_on_nothing() -> None:
    """FROM scratch has no lower layer but the image's own."""
    plan = plan_build(parse_formfile("NAME a\nFROM scratch\n", path="F"))
    layer = {e.name: e for e in read_cpio(build_layer(plan, ()))}
    assert layer["formation/image/lower"].data == b"/image\n"


def test_what_does_not_fit_into_the_guest_is_refused() -> None:
    """A layer that would fill the guest's memory is an error that says which MEMORY it takes."""
    big = (ContextFile(path="big", kind="file", data=bytes(40 << 20)),)
    with pytest.raises(UsageError) as caught:
        layer_of("MEMORY 128\nCOPY big /big\n", big)
    assert caught.value.hint == "write MEMORY 176"


def test_the_digest_of_a_plan_knows_every_input() -> None:
    """Another file, mode, base or line gives another digest; comments do not."""
    plan = plan_of("COPY www /www\n")
    known = plan_digest(plan, FILES, base_digests=["a"])
    assert plan_digest(plan_of("# hi\nCOPY www /www\n"), FILES, base_digests=["a"]) == known
    others = {
        plan_digest(plan, FILES, base_digests=["b"]),
        plan_digest(plan, FILES[:-1], base_digests=["a"]),
        plan_digest(plan_of("COPY www /web\n"), FILES, base_digests=["a"]),
        plan_digest(plan_of("COPY www /www\nVCPU 2\n"), FILES, base_digests=["a"]),
    }
    assert known not in others
    assert len(others) == 4


def test_only_what_is_copied_is_wanted() -> None:
    """A path is read from disk only if a COPY takes it."""
    plan = plan_of("COPY www /www\n")
    assert [is_wanted(plan, p) for p in ("www", "www/a", "wwwx", "other")] == [True, True, False, False]
