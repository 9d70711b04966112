"""`formation vm create`: from an image's name to a VM that says it is ready."""

from __future__ import annotations

import random
import string
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from formation.cli.completion import complete_images
from formation.cli.context import Cli
from formation.cli.output import Column
from formation.core.errors import EXIT_PENDING, ConflictError, NotFoundError, UsageError
from formation.core.units import GIB, MIB, format_duration, format_size, parse_duration_s, parse_size_bytes

if TYPE_CHECKING:
    from formation.cli.watch import Step, Watch
    from formation.core.event import VmRequested
    from formation.core.spec import PortMap

# Emulation without KVM boots a small guest in under a minute; a first pull of an image comes on top.
TIMEOUT_DEFAULT = "5m"
_SUFFIX_LENGTH = 4
_HTTP_PORTS = (80, 3000, 5000, 8000, 8080)

PLACEMENT_COLUMNS = (
    Column("NODE", lambda row: str(row.get("name", ""))),
    Column("FITS", lambda row: "yes" if row.get("fits") else "no", style=lambda row: "green" if row.get("fits") else "red"),
    Column("WHY", lambda row: str(row.get("why", ""))),
)

EXAMPLES = (
    "formation create hello                                a VM with a name of its own",
    "formation create hello web --cpus 2 --memory 1GiB     named web, of this size",
    "formation create hello web --publish 8080:80          the guest's port 80 at the node's port 8080",
    "formation create hello --require region=eu --dry-run  where it would go, and what each node lacks",
    "formation create hello --failover 30s                 if its node is lost, another starts it after 30 s",
    "formation create hello --env GREETING=hi --detach -q  do not wait; print the id only",
)


def create_vm(
    cli: Cli,
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Name, digest or digest prefix of an image.", autocompletion=complete_images)
    ],
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Default: the image's name and four letters.")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", "-c", metavar="COUNT", help="Default: what the image asks for.")] = None,
    memory: Annotated[str | None, typer.Option("--memory", "-m", metavar="SIZE", help="Such as 512MiB.")] = None,
    disk: Annotated[str | None, typer.Option("--disk", "-d", metavar="SIZE", help="Such as 10GiB.")] = None,
    publish: Annotated[
        list[str] | None,
        typer.Option("--publish", "-p", metavar="HOST:GUEST", help="Publish a port. Default: each TCP port the image exposes."),
    ] = None,
    no_publish: Annotated[bool, typer.Option("--no-publish", help="Publish no port.")] = False,
    env: Annotated[list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="Environment variable.")] = None,
    env_file: Annotated[list[Path] | None, typer.Option("--env-file", metavar="FILE", help="File of NAME=VALUE lines.")] = None,
    failover: Annotated[
        str | None,
        typer.Option(
            "--failover",
            metavar="DURATION",
            help="How long after its node was lost another starts it, with a new disk: 15s to 1d, or off. Default: 5m.",
        ),
    ] = None,
    restart: Annotated[
        str,
        typer.Option(
            "--restart",
            metavar="always|on-failure|never",
            help="Start it again when it ends by itself: always; on-failure: unless its guest powered off; never.",
        ),
    ] = "on-failure",
    require: Annotated[
        list[str] | None,
        typer.Option("--require", metavar="NAME=VALUE", help="A label that its node must have: region=eu, node=n1."),
    ] = None,
    apart: Annotated[
        str, typer.Option("--apart", metavar="GROUP", help="Never on a node where another of your VMs of this group is.")
    ] = "",
    spread: Annotated[
        str, typer.Option("--spread", metavar="GROUP", help="Where the fewest of your VMs of this group are.")
    ] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say where it would go and why; ask for nothing.")] = False,
    no_start: Annotated[bool, typer.Option("--no-start", help="Make it, but do not start it.")] = False,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", "--detach", help="Return when the network has accepted it (exit 8).")
    ] = False,
    timeout: Annotated[str, typer.Option("--timeout", metavar="DURATION", help="How long to wait.")] = TIMEOUT_DEFAULT,
) -> int:
    """Make a VM of an image, start it, and wait until the guest says that it is ready."""
    from formation.cli.follow import follow_wish, send_wish
    from formation.cli.progress import Progress
    from formation.cli.watch import Goal, Watch
    from formation.cli.wish import make_wish, node_names

    started_s = time.monotonic()
    timeout_s = parse_duration_s(timeout, what="--timeout")
    environment = (env or [], env_file or [])
    wanted = _Wanted(name, cpus, memory, disk, publish or [], no_publish, *environment, failover, restart, no_start)
    wanted.place(require or [], apart=apart, spread=spread)
    request = wanted.request(_image(cli, image))
    made = make_wish(cli, request)
    if dry_run:
        return print_placement(cli, cli.client.ask_placement(made.wish.signed.raw))
    watch = Watch(
        goal=Goal.RUNNING,
        vm_id=made.object_id,
        label=request.name,
        generation=0,
        started_s=started_s,
        node_names=node_names(cli),
        is_placed=False,
    )
    with Progress(cli.out) as progress:
        if no_wait or no_start:
            send_wish(cli.client, made.wish)
            progress.steps(watch.accepted(time.monotonic()))
        else:
            follow_wish(cli.client, made.wish, watch, progress, timeout_s=timeout_s)
    _print_result(cli, watch, time.monotonic() - started_s)
    if no_start:
        cli.out.hint(f"\nStart it: formation vm start {watch.label}")
    elif no_wait:
        cli.out.hint(f"\nSee how it goes: formation vm show {watch.label}")
    else:
        _print_hints(cli, watch)
    return EXIT_PENDING if no_wait and not no_start else 0


class _Wanted:
    """The flags, and how they become a request."""

    def __init__(
        self,
        name: str | None,
        cpus: int | None,
        memory: str | None,
        disk: str | None,
        publish: Sequence[str],
        no_publish: bool,
        env: Sequence[str],
        env_files: Sequence[Path],
        failover: str | None,
        restart: str,
        no_start: bool,
    ) -> None:
        """Check what can be checked without asking a node.

        Raises:
          UsageError: names the flag.
        """
        from formation.cli.ports import parse_env, parse_publish
        from formation.core.ids import check_label
        from formation.core.spec import DISK_GIB_MAX, FAILOVER_S_DEFAULT, MEMORY_MIB_MAX, MEMORY_MIB_MIN, VCPUS_MAX, Restart

        if publish and no_publish:
            raise UsageError("--publish and --no-publish exclude each other", hint="leave one away")
        self._name = check_label(name, what="NAME") if name is not None else None
        self._vcpus = None if cpus is None else _in_range(cpus, "--cpus", 1, VCPUS_MAX, "")
        self._memory_mib = None if memory is None else _size(memory, "--memory", MIB, "MiB", MEMORY_MIB_MIN, MEMORY_MIB_MAX)
        self._disk_gib = None if disk is None else _size(disk, "--disk", GIB, "GiB", 1, DISK_GIB_MAX)
        self._publish = [parse_publish(text) for text in publish]
        self._no_publish = no_publish
        self._env = parse_env(env, env_files)
        self._failover_s = FAILOVER_S_DEFAULT if failover is None else _failover_s(failover)
        if restart not in set(Restart):
            raise UsageError(f"--restart: {restart[:40]!r} is none of them", hint=f"give {', '.join(Restart)}")
        self._restart = Restart(restart)
        self._no_start = no_start
        self._require: dict[str, str] = {}
        self._apart = self._spread = ""

    def place(self, require: Sequence[str], *, apart: str, spread: str) -> None:
        """Where it may go.

        Raises:
          UsageError: names the flag.
        """
        from formation.core.ids import check_label
        from formation.core.spec import parse_labels

        self._require = parse_labels(require, what="--require")
        self._apart = check_label(apart, what="--apart") if apart else ""
        self._spread = check_label(spread, what="--spread") if spread else ""

    def request(self, image: Mapping[str, Any]) -> VmRequested:
        """The event that asks for this VM.

        Raises:
          UsageError: no node would accept it.
        """
        from formation.core.event import VmRequested
        from formation.core.spec import Desired, check_vm_spec

        defaults = image.get("resources") or {}
        image_name = str(image.get("name") or "vm")
        fields: dict[str, Any] = {
            "name": self._name or random_name(image_name),
            "image": str(image["digest"]),
            "image_name": image_name,
            "vcpus": self._vcpus or int(defaults.get("vcpus", 1)),
            "memory_mib": self._memory_mib or int(defaults.get("memory_mib", 256)),
            "disk_gib": self._disk_gib or int(defaults.get("disk_gib", 1)),
            "publish": self._ports(image),
            "env": self._env,
            "failover_s": self._failover_s,
            "restart": self._restart,
            "require": self._require,
            "apart": self._apart,
            "spread": self._spread,
            "desired": Desired.STOPPED if self._no_start else Desired.RUNNING,
        }
        request = VmRequested(**fields)
        check_vm_spec(request.spec)
        return request

    def _ports(self, image: Mapping[str, Any]) -> tuple[PortMap, ...]:
        from formation.core.spec import PortMap

        if self._publish or self._no_publish:
            return tuple(self._publish)
        return tuple(PortMap(int(port), "tcp", 0) for port, transport in image.get("expose") or () if transport == "tcp")


def print_placement(cli: Cli, found: Any) -> int:
    """Where a VM goes, and what each node is for it; 6 where none would take it."""
    if not cli.out.is_for_people:
        cli.out.record(found, (), name="next_node")
        return 0 if found["next_node"] else ConflictError.exit_status
    for title, text in (("Where it is", found.get("node")), ("Why", found.get("why")), ("Waits", found.get("reason"))):
        if text:
            cli.out.line(f"{title}: {text}")
    where = f"to {found['next_node']}" if found["next_node"] else "nowhere"
    cli.out.line(f"{'Now it' if found.get('node') else 'It'} would go {where}: {found['next_why']}")
    cli.out.line("")
    cli.out.rows(found["nodes"], PLACEMENT_COLUMNS, name="node_id", empty="No live node.")
    return 0 if found["next_node"] else ConflictError.exit_status


def random_name(image_name: str) -> str:
    """The image's name and four random letters: unlikely to be taken, easy to type."""
    suffix = "".join(random.choices(string.ascii_lowercase, k=_SUFFIX_LENGTH))
    return f"{image_name[: 62 - _SUFFIX_LENGTH]}-{suffix}"


def _image(cli: Cli, reference: str) -> Mapping[str, Any]:
    from formation.cli.client import segment

    try:
        image = cli.client.get(f"/v1/images/{segment(reference)}")
    except NotFoundError as exc:
        raise NotFoundError(
            f"no image matches {reference!r}", hint="formation image list shows them; formation image build DIRECTORY makes one"
        ) from exc
    return image if isinstance(image, dict) else {}


def _failover_s(text: str) -> int:
    from formation.core.spec import FAILOVER_S_MAX, FAILOVER_S_MIN

    if text == "off":
        return 0
    seconds = parse_duration_s(text, what="--failover")
    if not FAILOVER_S_MIN <= seconds <= FAILOVER_S_MAX:
        raise UsageError(f"--failover: {text} is out of range", hint=f"give {FAILOVER_S_MIN}s to 1d, or off")
    return round(seconds)


def _in_range(value: int, flag: str, low: int, high: int, unit: str) -> int:
    if value not in range(low, high + 1):
        raise UsageError(
            f"{flag}: {value}{unit} is not within {low}{unit} and {high}{unit}", hint=f"give {low} to {high}{unit}"
        )
    return value


def whole_units(text: str, flag: str, unit_bytes: int, unit: str) -> int:
    """How many whole units a size has.

    Raises:
      UsageError: no unit, or not whole.
    """
    size_bytes = parse_size_bytes(text, what=flag)
    if size_bytes % unit_bytes:
        raise UsageError(f"{flag}: {text} is not a whole number of {unit}", hint=f"write {size_bytes // unit_bytes + 1}{unit}")
    return size_bytes // unit_bytes


def _size(text: str, flag: str, unit_bytes: int, unit: str, low: int, high: int) -> int:
    return _in_range(whole_units(text, flag, unit_bytes, unit), flag, low, high, unit)


def _print_result(cli: Cli, watch: Watch, total_s: float) -> None:
    vm = watch.vm or _show_or_bare(cli, watch)
    shown = {**vm, "steps": [step_json(step) for step in watch.steps], "total_ms": round(total_s * 1000)}
    cli.out.record(shown, _columns(watch.steps, total_s), name="vm_id")


def _show_or_bare(cli: Cli, watch: Watch) -> dict[str, Any]:
    from formation.core.errors import FormationError

    try:
        vm = cli.client.get(f"/v1/vms/{watch.vm_id}")
    except FormationError:
        # It is accepted: that the node cannot show it just now does not make the command fail.
        vm = None
    return vm if isinstance(vm, dict) else {"vm_id": watch.vm_id, "spec": {"name": watch.label}}


def step_json(step: Step) -> dict[str, Any]:
    """A step as programs see it."""
    return {"step": step.name, "text": step.text, "elapsed_ms": round(step.elapsed_s * 1000)}


def _columns(steps: Sequence[Step], total_s: float) -> list[Column]:
    from formation.cli.vm_columns import VM_FIELDS

    wanted = ("Name", "Id", "Phase", "Node", "Ports", "Boot time")
    times = "\n".join(f"{format_duration(step.elapsed_s):>7}  {step.text}" for step in steps)
    return [
        *[column for column in VM_FIELDS if column.title in wanted],
        Column("Steps", lambda _: times),
        Column("Total", lambda _: f"{format_duration(total_s):>7}"),
    ]


def _print_hints(cli: Cli, watch: Watch) -> None:
    name = watch.label
    lines = [f"Logs:    formation vm logs -f {name}", f"Console: formation vm console {name}"]
    url = page_url(watch.vm)
    if url:
        lines.insert(0, f"Open:    {url}")
    cli.out.hint("\n" + "\n".join(lines))


def page_url(vm: Mapping[str, Any]) -> str:
    """Where a browser would look: the first published port that usually speaks HTTP."""
    status = vm.get("status") or {}
    for port in status.get("ports") or ():
        if isinstance(port, list | tuple) and len(port) == 3 and port[0] in _HTTP_PORTS and port[1] == "tcp":
            return f"http://{status.get('address')}:{port[2]}/"
    return ""


def describe_size(size_bytes: Any) -> str:
    """A size for a table; empty when it is unknown."""
    return format_size(size_bytes) if isinstance(size_bytes, int) else ""
