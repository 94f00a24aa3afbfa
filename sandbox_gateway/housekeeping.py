"""What an installation has no more use for on the disk, removed beside the work without being asked."""

from __future__ import annotations

import contextlib
import logging

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.images.service import ImageService
from sandbox_gateway.profiles import load_profiles
from sandbox_gateway.snapshots import SnapshotStore, collect, layers_in_use
from sandbox_gateway.store import Store
from sandbox_gateway.templates import TemplateRecords

log = logging.getLogger(__name__)


def tidy(paths: Paths, store: Store, snapshots: SnapshotStore, images: ImageService) -> None:
    """Remove snapshots that nobody needs and those beyond the budget, then the layers that nothing needs now. Blocks.

    Layers stay while a snapshot cannot be read, since nobody knows which of them it needs.
    """
    budget = None
    with contextlib.suppress(SandboxGatewayError):  # a profile file that cannot be read asks for nothing
        budget = load_profiles(paths).settings.snapshot_budget
    collect(snapshots, store.list, budget=budget, orphaned=TemplateRecords(paths).orphaned)
    try:
        for layer in images.collect(lambda: layers_in_use(snapshots, store.list, sure=True)):
            log.info("removed the layer of %s (%.0f MiB): nothing uses it now", layer.what, layer.size / (1 << 20))
    except SandboxGatewayError as error:
        if error.code != "snapshot_damaged":
            raise
        log.debug("all layers stay: %s", error.message)
