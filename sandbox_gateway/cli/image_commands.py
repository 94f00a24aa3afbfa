"""``image ls``, ``build``, ``rm`` and ``prune``: the layers that root filesystems are made of."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from sandbox_gateway.cli.arguments import Commands, command
from sandbox_gateway.cli.failures import Usage, fail
from sandbox_gateway.cli.output import ProgressLine, age, size, write_json, write_line, write_table
from sandbox_gateway.model import timestamp

if TYPE_CHECKING:
    from sandbox_gateway.host.paths import Paths
    from sandbox_gateway.images.store import Progress


def add(commands: Commands) -> None:
    """Add ``image`` and its commands to the parser."""
    image = commands.add_parser(
        "image",
        help="list, build and remove image layers",
        description="Image layers: immutable files from which sandboxes get their root filesystem.",
    )
    parts = image.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=type(image))
    command(parts, "ls", _ls, "list the layers")
    build = command(
        parts,
        "build",
        _build,
        "build the images of profiles now, so that no kernel waits for it",
        "Without names: those of all profiles. What is current is not built again.",
    )
    build.add_argument("profiles", nargs="*", metavar="PROFILE", help="a profile's name")
    build.add_argument("--image", metavar="SOURCE", help="an image as a profile names it, instead of profiles")
    build.add_argument("--editable", action="store_true", help="with --image: take editable installs in")
    rm = command(parts, "rm", _rm, "remove layers that no sandbox or snapshot uses")
    rm.add_argument("digests", nargs="+", metavar="DIGEST", help="a layer's digest, or an unambiguous beginning of it")
    command(parts, "prune", _prune, "remove the layers that nothing uses and no environment has now")


def _ls(options: argparse.Namespace) -> None:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.images.store import LayerStore

    paths = discover()
    layers = LayerStore(paths).list()
    used = _referenced(paths)
    if options.json:
        write_json(
            [
                {**layer.as_dict(), "created": timestamp(layer.created), "in_use": layer.digest in used}
                for layer in layers
            ]
        )
        return
    rows = [
        (
            layer.digest.removeprefix("sha256:")[:12],
            size(layer.size),
            age(layer.created),
            "in use" if layer.digest in used else "current" if layer.current else "unused",
            layer.what,
        )
        for layer in layers
    ]
    write_table(("DIGEST", "SIZE", "AGE", "STATE", "WHAT"), rows)
    if layers and sys.stdout.isatty():
        write_line(f"{size(sum(layer.size for layer in layers))} in {paths.layers}")


def _build(options: argparse.Namespace) -> None:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.images.service import ImageService
    from sandbox_gateway.profiles import load_profiles

    paths = discover()
    if options.image is not None and options.profiles:
        raise Usage("jupyter sandbox image build", "--image and profiles cannot be given together")
    if options.image is not None:
        wanted = [(options.image, bool(options.editable))]
    else:
        profiles = load_profiles(paths)
        chosen = [profiles.get(name) for name in options.profiles or profiles]
        wanted = list(dict.fromkeys((profile.image, profile.editable) for profile in chosen))
    service = ImageService(paths)
    built = []
    with ProgressLine() as progress:
        for source, editable in wanted:
            progress.update(f"looking at the image {source}")
            # Not on a thread of asyncio's: Ctrl-C is to end the build itself, which then leaves nothing.
            built.append(service.resolve_sync(source, editable, progress=lambda step: _show(progress, step)))
    if options.json:
        write_json(
            [
                {
                    "name": image.name,
                    "interpreter": image.interpreter,
                    "layers": [
                        {
                            "digest": layer.digest,
                            "destination": layer.destination,
                            "kind": layer.kind,
                            "source": layer.source,
                        }
                        for layer in image.layers
                    ],
                }
                for image in built
            ]
        )
        return
    for image in built:
        live = any(layer.kind != "erofs" for layer in image.layers)
        write_line(f"{image.name}: {len(image.layers)} layers{', a live view of this machine' if live else ''}")


def _show(progress: ProgressLine, step: Progress) -> None:
    text = step.message or f"building {step.what}"
    if step.total_bytes:
        progress.update(f"building {step.what}", f"{min(100, 100 * step.done_bytes // step.total_bytes)} %")
    else:
        progress.update(text, size(step.done_bytes) if step.done_bytes else "")


def _rm(options: argparse.Namespace) -> int:
    from sandbox_gateway.errors import SandboxGatewayError
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.images.store import LayerStore

    paths = discover()
    layers, used = LayerStore(paths), _referenced(paths)
    removed, status = [], 0
    for digest in dict.fromkeys(options.digests):
        try:
            removed.append({"digest": digest, "bytes": layers.remove(digest, used)})
        except SandboxGatewayError as error:
            status = fail(error, options.json)
    if options.json:
        write_json(removed)
    else:
        for item in removed:
            write_line(f"removed {item['digest']} ({size(int(item['bytes']))})")
    return status


def _prune(options: argparse.Namespace) -> None:
    from sandbox_gateway.host.paths import discover
    from sandbox_gateway.images.store import LayerStore

    paths = discover()
    removed = LayerStore(paths).collect(_referenced(paths))
    if options.json:
        write_json([layer.as_dict() for layer in removed])
        return
    for layer in removed:
        write_line(f"removed {layer.digest.removeprefix('sha256:')[:12]} ({size(layer.size)}) {layer.what}")
    write_line(f"{size(sum(layer.size for layer in removed))} freed")


def _referenced(paths: Paths) -> frozenset[str]:
    from sandbox_gateway.cli.actions import opened
    from sandbox_gateway.snapshots import SnapshotStore, layers_in_use

    with opened(paths) as store:
        return layers_in_use(SnapshotStore(paths), store.list if store is not None else tuple)
