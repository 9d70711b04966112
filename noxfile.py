"""What can be checked and shown; each session runs in the environment that `bootstrap` made.

nox -s lint types imports tests sim interop e2e     what `./bootstrap test` runs
nox -s demo -- --keep                       the main job, on this machine
nox -s bench                                figures
nox -s fuzz -- 600                          decoders and a replica under hostile bytes, so many seconds each
"""

from __future__ import annotations

import os
import shutil

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "imports", "tests", "sim", "interop", "e2e"]
nox.options.error_on_missing_interpreters = False
# Two guests at once are what two cores emulate without missing their boot deadline.
WORKERS = str(min(2, os.cpu_count() or 1))
SOURCES = ("formation", "tests", "bench", "noxfile.py")
# Ctrl-C goes to the demo as well; it needs time to end its nodes and guests.
CLEAN_UP_S = 40.0


@nox.session
def lint(session: nox.Session) -> None:
    """Style and form."""
    session.run("ruff", "check", *SOURCES)
    session.run("ruff", "format", "--check", *SOURCES)


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly."""
    session.run("mypy")


@nox.session
def imports(session: nox.Session) -> None:
    """The floors of the house, and that each contract can fail."""
    session.run("lint-imports")
    session.run("pytest", "-q", "tests/contracts", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Unit, property and wire tests; those with real guests too."""
    session.run(
        "pytest",
        "-q",
        "-n",
        WORKERS,
        "tests",
        "--ignore=tests/e2e",
        "--ignore=tests/interop",
        "--ignore=tests/sim",
        "--ignore=tests/contracts",
        *session.posargs,
    )


@nox.session
def sim(session: nox.Session) -> None:
    """Whole clusters in one process, by seed; `-- --first-seed N --seeds M` runs any others (see tests/sim/__main__.py)."""
    if any(option in session.posargs for option in ("--first-seed", "--seeds", "--seed", "--scenario")):
        session.run("python", "-m", "tests.sim", "--workers", WORKERS, *session.posargs)
    else:
        session.run("pytest", "-q", "-n", WORKERS, "tests/sim", *session.posargs)


@nox.session
def interop(session: nox.Session) -> None:
    """With a peer in JavaScript, where there is Node.js."""
    session.run("pytest", "-q", "tests/interop", *session.posargs)


@nox.session
def e2e(session: nox.Session) -> None:
    """Real node processes and real guests."""
    session.run("pytest", "-q", "tests/e2e", *session.posargs)


# Of each target, when nobody says otherwise: new coverage comes seldom after it.
FUZZ_S = "60"


@nox.session(venv_backend="venv")
def fuzz(session: nox.Session) -> None:
    """Coverage-guided: every decoder of hostile bytes, then a whole replica; in an environment of its own, for atheris.

    The argument is how many seconds each of the two goes on. What they find stays in the session's folder.
    """
    session.install("--quiet", "--editable", ".[dev,fuzz]")
    limit = f"-max_total_time={session.posargs[0] if session.posargs else FUZZ_S}"
    for target in ("decoders", "replica"):
        corpus = session.create_tmp() + f"/{target}"
        os.makedirs(corpus, exist_ok=True)
        # A minute for one input is a hang; libFuzzer itself would wait for twenty.
        session.run(
            "python",
            "-m",
            "tests.fuzz.coverage_guided",
            target,
            limit,
            "-timeout=60",
            "-max_len=16384",
            f"-artifact_prefix={corpus}/",
            corpus,
        )


@nox.session
def demo(session: nox.Session) -> None:
    """The main job on this machine."""
    session.run("formation", "demo", *session.posargs, interrupt_timeout=CLEAN_UP_S, terminate_timeout=CLEAN_UP_S)


@nox.session
def bench(session: nox.Session) -> None:
    """Figures; see bench/README.md."""
    session.run("python", "-m", "bench.run", *session.posargs)


@nox.session
def lock(session: nox.Session) -> None:
    """Write requirements.lock anew from pyproject.toml's ranges, in a fresh environment."""
    folder = session.create_tmp()
    shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "venv", folder)
    session.run(f"{folder}/bin/pip", "install", "--quiet", "--editable", ".[dev]")
    frozen = session.run(f"{folder}/bin/pip", "freeze", "--exclude-editable", silent=True)
    assert isinstance(frozen, str)
    with open("requirements.lock", "w", encoding="ascii") as file:
        file.write("# Every package at the version that was tested; written by `nox -s lock`.\n" + frozen)
