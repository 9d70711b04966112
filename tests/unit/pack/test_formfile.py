from __future__ import annotations

import pytest

from formation.core.errors import UsageError
from formation.pack.formfile import (
    FORMFILE_SIZE_MAX_BYTES,
    LINE_LENGTH_MAX,
    Copy,
    Gpu,
    Install,
    Run,
    decode_formfile,
    parse_formfile,
)
from formation.pack.manifest import EnvVar
from formation.pack.passwords import crypt_sha512, salt_for

HEAD = "NAME web\nFROM busybox\n"
FULL = """\
# everything
NAME web
DESCRIPTION A site,  with  blanks # and no comment
FROM debian:bookworm
RUN apt-get update && echo "done"
COPY 'my site' /srv/www/
COPY ./etc//app.conf /etc/app.conf
INSTALL nginx-light curl=7.88.1-10
ENV PLAIN=one
ENV --scope=user:ada EDITOR='vi -R'
ENV --scope=service:web TOKEN="a \\"b\\""
ENV EMPTY=
USER username:ada passwd=secret groups:sudo,www sudo:yes shell:/bin/ash ssh_authorized_keys:'ssh-ed25519 AAAA ada@home'
CORES 4
MBS 1024
STORAGE 20
GPU A100:2
WORKDIR /srv//www/.
EXPOSE 80 443/tcp 53/udp
ENTRYPOINT nginx -g 'daemon off;'
"""


def test_every_directive_is_understood() -> None:
    """A Formfile with every directive gives exactly what it says."""
    f = parse_formfile(FULL, path="Formfile")
    assert (f.name, f.base, f.description) == ("web", "debian:bookworm", "A site,  with  blanks # and no comment")
    run, first, second, install = f.steps
    assert isinstance(run, Run)
    assert run.command == 'apt-get update && echo "done"'
    assert isinstance(first, Copy)
    assert (first.source, first.target, first.into_directory) == ("my site", "/srv/www", True)
    assert isinstance(second, Copy)
    assert (second.source, second.target, second.into_directory) == ("etc/app.conf", "/etc/app.conf", False)
    assert isinstance(install, Install)
    assert install.packages == ("nginx-light", "curl=7.88.1-10")
    assert f.env == (
        EnvVar("system", "PLAIN", "one"),
        EnvVar("user:ada", "EDITOR", "vi -R"),
        EnvVar("service:web", "TOKEN", 'a "b"'),
        EnvVar("system", "EMPTY", ""),
    )
    (ada,) = f.users
    assert (ada.name, ada.groups, ada.sudo, ada.shell, ada.lock_password) == ("ada", ("sudo", "www"), True, "/bin/ash", False)
    assert ada.ssh_authorized_keys == ("ssh-ed25519 AAAA ada@home",)
    assert (f.vcpus, f.memory_mib, f.disk_gib, f.workdir) == (4, 1024, 20, "/srv/www")
    assert isinstance(f.gpu, Gpu)
    assert (f.gpu.model, f.gpu.count) == ("A100", 2)
    assert f.expose == ((80, "tcp"), (443, "tcp"), (53, "udp"))
    assert f.entrypoint == ("nginx", "-g", "daemon off;")


def test_a_password_is_kept_as_its_hash_only() -> None:
    """Nothing of a parsed Formfile holds the clear password; the hash is sha512-crypt's."""
    f = parse_formfile(FULL, path="Formfile")
    assert f.users[0].password_hash == crypt_sha512("secret", salt_for("web", "ada"))
    assert f.users[0].password_hash.startswith("$6$")
    assert "secret" not in repr(f)


def test_a_hashed_password_stays() -> None:
    """A password that is sha512-crypt already is taken as it is."""
    hashed = crypt_sha512("x", "salt")
    assert parse_formfile(f"{HEAD}USER username:a passwd:'{hashed}'\n", path="F").users[0].password_hash == hashed


def test_defaults() -> None:
    """What a Formfile does not say is small."""
    f = parse_formfile(HEAD, path="F")
    assert (f.vcpus, f.memory_mib, f.disk_gib, f.workdir, f.entrypoint, f.users) == (1, 512, 1, "/", (), ())


@pytest.mark.parametrize(
    "text", [HEAD.replace("\n", "\r\n"), "\ufeff" + HEAD, "\tNAME\tweb\nFROM  busybox  ", "\n\n  # x\n" + HEAD]
)
def test_line_ends_tabs_and_marks_of_other_editors_are_accepted(text: str) -> None:
    """CRLF, tabs, a byte order mark, blank lines and a missing last line end are fine."""
    assert parse_formfile(text, path="F").name == "web"


def test_a_json_entrypoint_is_taken_letter_by_letter() -> None:
    """A JSON array gives its strings, whatever is in them."""
    f = parse_formfile(HEAD + 'ENTRYPOINT ["sh", "-c", "echo $HOME \\"x\\" \\n"]\n', path="F")
    assert f.entrypoint == ("sh", "-c", 'echo $HOME "x" \n')


BROKEN = [
    ("NAM web\nFROM busybox\n", "1:1: expected a directive, found 'NAM'", "did you mean NAME?"),
    ("name web\nFROM busybox\n", "1:1: expected a directive, found 'name'", "capitals: NAME"),
    (HEAD + "  ENTRYPONT x\n", "3:3: expected a directive, found 'ENTRYPONT'", "did you mean ENTRYPOINT?"),
    (HEAD + "HEALTHCHECK x\n", "3:1: expected a directive, found 'HEALTHCHECK'", "known: NAME"),
    ("FROM busybox\n", "1:1: expected a NAME directive, found none", "for example: NAME hello"),
    ("NAME web\n", "1:1: expected a FROM directive, found none", "for example: FROM busybox"),
    ("", "1:1: expected a NAME directive, found none", "for example"),
    (HEAD + "NAME other\n", "3:1: expected NAME at most once; line 1 has it already", "remove one"),
    (HEAD + "CPU 1\nCORES 2\n", "4:1: expected CORES at most once; line 3 has it already (as CPU)", "remove one"),
    (HEAD + "WORKDIR /a\nWORKDIR /b\n", "4:1: expected WORKDIR at most once; line 3 has it already", "remove one"),
    ("NAME Web_1\nFROM busybox\n", "1:6: expected a name, found 'Web_1'", "a-z, 0-9"),
    ("NAME web # mine\nFROM busybox\n", "1:10: expected nothing more after 'web'", "a comment stands on a line of its own"),
    ("NAME\nFROM busybox\n", "1:5: expected a name after NAME", "for example: NAME hello"),
    ("NAME web\nFROM busy box\n", "2:11: expected nothing more after 'busy'", "for example: FROM busybox"),
    ("NAME web\nFROM $(id)\n", "2:6: expected an image reference, found '$(id)'", "for example"),
    (HEAD + "VCPU two\n", "3:6: expected a whole number of vCPUs from 1 to 128, found 'two'", "VCPU 2"),
    (HEAD + "VCPU 129\n", "3:6: expected a whole number of vCPUs from 1 to 128, found '129'", "VCPU 2"),
    (HEAD + "MEM 512MiB\n", "3:5: expected a whole number of MiB from 128 to 256000, found '512MiB'", "MEMORY 512"),
    (HEAD + "MEMORY 64\n", "3:8: expected a whole number of MiB from 128 to 256000, found '64'", "MEMORY 512"),
    (HEAD + "DISK 0\n", "3:6: expected a whole number of GiB from 1 to 65535, found '0'", "DISK 5"),
    (HEAD + "DISK ²\n", "3:6: expected a whole number of GiB", "DISK 5"),
    (HEAD + "GPU A100:9\n", "3:5: expected MODEL or MODEL:COUNT with 1 to 8, found 'A100:9'", "GPU A100:2"),
    (HEAD + "COPY www\n", "3:9: expected a source and a target, found 1 words", "quote a path"),
    (HEAD + "COPY a b c\n", "3:10: expected a source and a target, found 3 words", "quote a path"),
    (HEAD + "COPY ../secret /x\n", "3:6: expected a path inside the build context, found '../secret'", "relative path"),
    (HEAD + "COPY /etc/passwd /x\n", "3:6: expected a path inside the build context, found '/etc/passwd'", "relative path"),
    (HEAD + "COPY a www\n", "3:8: expected an absolute path for COPY's target, found 'www'", "write /www"),
    (HEAD + "COPY a /www/../../x\n", "3:8: expected a path without ..", "write the path out"),
    (HEAD + "COPY a /proc/x\n", "3:8: expected a target outside /proc", "anew at each boot"),
    (HEAD + "COPY 'a /b\n", "3:6: expected the quote that opens here to be closed", "one line"),
    (HEAD + "RUN make \\\n", "3:10: expected the command to end on this line", "&&"),
    (HEAD + "INSTALL nginx $(x)\n", "3:15: expected a package name, found '$(x)'", "INSTALL nginx-light"),
    (HEAD + "ENV NOVALUE\n", "3:5: expected KEY=value", "for example"),
    (HEAD + "ENV 1A=x\n", "3:5: expected a variable's name, found '1A'", "not starting with a digit"),
    (HEAD + "ENV A=b c\n", "3:9: expected the value to end here", "ENV A='…'"),
    (HEAD + "ENV A=1\nENV A=2\n", "4:5: expected A once in scope system; line 3 has it already", "remove one"),
    (HEAD + "ENV --scop=system A=1\n", "3:5: expected --scope=…, found '--scop=system'", "for example"),
    (HEAD + "ENV --scope=all A=1\n", "3:13: expected system, user:NAME or service:NAME, found 'all'", "for example"),
    (HEAD + "ENV --scope=user:bob A=1\n", "3:22: expected a USER named 'bob' for this scope", "add: USER username:bob"),
    (HEAD + "USER ada\n", "3:6: expected field:value", "USER username:ada"),
    (HEAD + "USER usrname:ada\n", "3:6: expected a field of USER, found 'usrname'", "did you mean username?"),
    (HEAD + "USER passwd:x\n", "3:6: expected a username in USER", "for example"),
    (HEAD + "USER username:Ada\n", "3:6: expected a username, found 'Ada'", "a-z"),
    (HEAD + "USER username:a sudo:maybe\n", "3:17: expected true or false, found 'maybe'", "true, yes"),
    (HEAD + "USER username:a shell:sh\n", "3:17: expected an absolute path for shell, found 'sh'", "write /sh"),
    (HEAD + "USER username:a\nUSER username:a\n", "4:6: expected a once; line 3 has it already", "one line"),
    (HEAD + "USER username:a ssh_authorized_keys:AAAA\n", "3:17: expected public keys", "quote it"),
    (HEAD + "WORKDIR srv\n", "3:9: expected an absolute path for WORKDIR, found 'srv'", "write /srv"),
    (HEAD + "EXPOSE 80 70000\n", "3:11: expected a port from 1 to 65535", "EXPOSE 80/tcp"),
    (HEAD + "EXPOSE 80/sctp\n", "3:8: expected a port from 1 to 65535", "EXPOSE 80/tcp"),
    (HEAD + "EXPOSE 80\nEXPOSE 80/tcp\n", "4:8: expected each port once; line 3 has 80/tcp already", "remove one"),
    (HEAD + 'ENTRYPOINT ["a", ]\n', "3:18: expected a JSON array of strings", "ENTRYPOINT ["),
    (HEAD + 'ENTRYPOINT ["a", 1]\n', "3:12: expected a JSON array of strings, found something else", "ENTRYPOINT ["),
    (HEAD + "ENTRYPOINT []\n", "3:12: expected a program", "ENTRYPOINT ["),
    (HEAD + "ENTRYPOINT A=b prog\n", "3:12: expected a program, found a variable", "set variables with ENV"),
    (HEAD + "ENTRYPOINT a\\\n", "3:13: expected a character after the backslash", "one line"),
    (HEAD + "RUN a\x00b\n", "3:6: expected text, found a control character", "remove it"),
    (HEAD + "RUN a\rb\n", "3:6: expected text, found a control character", "remove it"),
    (HEAD + "RUN " + "x" * LINE_LENGTH_MAX, f"3:{LINE_LENGTH_MAX + 1}: expected the line to end within", "is this a Formfile?"),
]


@pytest.mark.parametrize(("text", "message", "hint"), BROKEN)
def test_each_mistake_is_told_with_its_place_and_a_hint(text: str, message: str, hint: str) -> None:
    """An error names file, line, column and what was expected, and says how to mend it."""
    with pytest.raises(UsageError) as caught:
        parse_formfile(text, path="dir/Formfile")
    assert caught.value.message.startswith(f"dir/Formfile:{message}")
    assert hint in caught.value.hint


def test_too_large_and_not_utf_8_are_told() -> None:
    """Bytes that are no text are an error at their place."""
    with pytest.raises(UsageError, match=r"^F:2:7: expected UTF-8 text$"):
        decode_formfile("NAME web\nFROM é".encode() + b"\xff", path="F")
    with pytest.raises(UsageError, match=r"^F:1:1: expected at most 262144 bytes"):
        decode_formfile(b"#" * (FORMFILE_SIZE_MAX_BYTES + 1), path="F")


@pytest.mark.parametrize(
    ("password", "salt", "hashed"),
    [
        (
            "Hello world!",
            "saltstring",
            "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
        )
    ],
)
def test_sha512_crypt_gives_drepper_s_vector(password: str, salt: str, hashed: str) -> None:
    """The test vector of the specification holds (Drepper 2007, SHA-crypt.txt)."""
    assert crypt_sha512(password, salt) == hashed
