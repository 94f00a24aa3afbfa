"""Snapshots as things of their own: made, named, verified, used, removed (DESIGN sections 2 and 4.6).

:class:`SnapshotStore` is the way in. What is in an image is the runtime's business
(:class:`~sandbox_gateway.runtimes.base.Snapshots`); this package knows only that it is a directory of files.
"""

from sandbox_gateway.snapshots.collect import Removable, collect, layers_in_use, needed_by, removable, runsc_in_use
from sandbox_gateway.snapshots.draft import Draft, Snapshot
from sandbox_gateway.snapshots.locks import Lease
from sandbox_gateway.snapshots.manifest import Facts, FileIdentity, ImageFile, Kind, Manifest, WorkspaceFile
from sandbox_gateway.snapshots.store import Entry, SnapshotStore
from sandbox_gateway.snapshots.workspace import changed_files, check_files, describe_files

__all__ = [
    "Draft",
    "Entry",
    "Facts",
    "FileIdentity",
    "ImageFile",
    "Kind",
    "Lease",
    "Manifest",
    "Removable",
    "Snapshot",
    "SnapshotStore",
    "WorkspaceFile",
    "changed_files",
    "check_files",
    "collect",
    "describe_files",
    "layers_in_use",
    "needed_by",
    "removable",
    "runsc_in_use",
]
