"""`formation image …`: build images on a node, and see those of the network."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from formation.cli.command import command, new_group
from formation.cli.completion import complete_images
from formation.cli.context import Cli
from formation.cli.output import Column
from formation.cli.vm_columns import since_text
from formation.cli.vm_create import describe_size
from formation.core.errors import NotFoundError, UnavailableError, UsageError, error_from_code

group = new_group("Images: build, look at.")

FORMFILE_NAME = "Formfile"

BUILD_EXAMPLES = (
    "formation image build examples/hello       build from examples/hello/Formfile",
    "formation image build . --name web         under another name",
    "formation image build . -f deploy/Formfile with another Formfile of the directory",
)


def _resources(image: Any) -> str:
    wanted = image.get("resources") or {}
    return f"{wanted.get('vcpus', '?')} vCPU, {wanted.get('memory_mib', '?')}MiB, {wanted.get('disk_gib', '?')}GiB"


def _expose(image: Any) -> str:
    return ", ".join(f"{port}/{transport}" for port, transport in image.get("expose") or ())


IMAGE_COLUMNS = (
    Column("NAME", lambda image: str(image.get("name", ""))),
    Column("DIGEST", lambda image: str(image.get("digest", ""))[:19]),
    Column("SIZE", lambda image: describe_size(image.get("size_bytes"))),
    Column("NODES", lambda image: ", ".join(image.get("nodes") or ()) or str(len(image.get("holders") or ()))),
    Column("EXPOSE", _expose),
    Column("AGE", lambda image: since_text(image.get("built_ms"))),
    Column("DEFAULTS", _resources, wide=True),
    Column("FULL DIGEST", lambda image: str(image.get("digest", "")), wide=True),
)
IMAGE_FIELDS = (
    Column("Name", lambda image: str(image.get("name", ""))),
    Column("Digest", lambda image: str(image.get("digest", ""))),
    Column("Size", lambda image: describe_size(image.get("size_bytes"))),
    Column("Defaults", _resources),
    Column("Exposes", _expose),
    Column("Held by", lambda image: ", ".join(image.get("nodes") or image.get("holders") or ())),
    Column("Built by", lambda image: str(image.get("built_on") or image.get("built_by", ""))),
    Column("Age", lambda image: since_text(image.get("built_ms"))),
)


def build_image(
    cli: Cli,
    directory: Annotated[Path, typer.Argument(metavar="[DIRECTORY]", help="The build context; holds the Formfile.")] = Path(),
    name: Annotated[str | None, typer.Option("--name", "-t", metavar="NAME", help="Default: what the Formfile says.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Formfile, inside the directory.")] = None,
) -> None:
    """Build an image of a directory with a Formfile, on the node; all nodes can then run it."""
    from formation.cli.context_tar import tar_chunks
    from formation.cli.progress import Progress
    from formation.core.ids import check_label

    started_s = time.monotonic()
    query = _build_query(directory, file)
    if name is not None:
        query["name"] = check_label(name, what="--name")
    image: dict[str, Any] | None = None
    with Progress(cli.out) as progress:
        for line in cli.client.post_stream("/v1/images/build", query, tar_chunks(directory)):
            if isinstance(line.get("error"), dict):
                error = line["error"]
                raise error_from_code(str(error.get("code", "")), str(error.get("message", "")), str(error.get("hint", "")))
            if isinstance(line.get("image"), dict):
                image = line["image"]
            elif line.get("step") != "done":
                progress.say(f"{line.get('step', '')}: {line.get('text', '')}")
        if image is None:
            raise UnavailableError("the node ended the build without a result", hint="see the node's log, then build again")
        progress.step(f"built {image.get('name', '')}", time.monotonic() - started_s)
    cli.out.record(image, IMAGE_FIELDS, name="digest")
    cli.out.hint(f"\nStart it: formation create {image.get('name', '')}")


def _build_query(directory: Path, file: Path | None) -> dict[str, str]:
    if not directory.is_dir():
        raise UsageError(f"{directory} is not a directory", hint="formation image build DIRECTORY (it holds the Formfile)")
    formfile = file or directory / FORMFILE_NAME
    if not formfile.is_file():
        raise NotFoundError(
            f"no Formfile at {formfile}", hint="a Formfile says what goes into the image; examples/hello has one"
        )
    if file is None:
        return {}
    try:
        inside = formfile.resolve().relative_to(directory.resolve())
    except ValueError as exc:
        raise UsageError(f"--file: {file} lies outside {directory}", hint="put it into the directory") from exc
    return {"formfile": inside.as_posix()}


command(group, "build", examples=BUILD_EXAMPLES)(build_image)
command(group, "pack", examples=BUILD_EXAMPLES, hidden=True)(build_image)


@command(group, "list", examples=("formation image list", "formation image list -o json"), aliases=("ls",))
def list_images(cli: Cli) -> None:
    """Show the network's images."""
    rows = cli.client.rows("/v1/images", "images")
    rows.sort(key=lambda image: (str(image.get("name", "")), -int(image.get("built_ms") or 0)))
    cli.out.rows(rows, IMAGE_COLUMNS, name="digest", empty="No images yet. Build one: formation image build DIRECTORY")


@command(
    group, "show", examples=("formation image show hello", "formation image show hello -o json"), aliases=("inspect", "info")
)
def show_image(
    cli: Cli,
    image: Annotated[
        str, typer.Argument(metavar="IMAGE", help="Name, digest, or unique prefix of a digest.", autocompletion=complete_images)
    ],
) -> None:
    """Show one image in full."""
    from formation.cli.client import segment

    found = cli.client.get(f"/v1/images/{segment(image)}")
    cli.out.record(found if isinstance(found, dict) else {}, IMAGE_FIELDS, name="digest")
