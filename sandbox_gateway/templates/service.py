"""Finding the template for a request, and seeing to it that there is one the next time."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable

from sandbox_gateway.errors import SandboxGatewayError
from sandbox_gateway.host.paths import Paths
from sandbox_gateway.model import Launch
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import Runtime, RuntimeReport, Snapshots
from sandbox_gateway.snapshots import Snapshot, SnapshotStore
from sandbox_gateway.suspension import Saved
from sandbox_gateway.templates.builder import Builder, Maker
from sandbox_gateway.templates.key import cores, key_of
from sandbox_gateway.templates.plan import Plan, Start, obstacle, without_client
from sandbox_gateway.templates.records import TemplateRecord, TemplateRecords
from sandbox_gateway.wire.handshake import VERSION

log = logging.getLogger(__name__)

_USELESS = frozenset({"snapshot_damaged", "snapshot_unfit", "unknown_snapshot"})
"""Failures that no second try gets over."""
DELAY = 2.0
"""Seconds after a cold start until its template is built beside it: the kernel's first cell comes first."""


class Templates:
    """The templates of one installation, as one lifecycle uses them. Use it on one event loop."""

    def __init__(
        self,
        paths: Paths,
        maker: Maker,
        snapshots: SnapshotStore,
        *,
        on_built: Callable[[TemplateRecord], None] | None = None,
        delay: float = DELAY,
    ) -> None:
        self.records = TemplateRecords(paths)
        self.builder = Builder(maker, snapshots, self.records, on_built)
        self._snapshots = snapshots
        self._delay = delay
        self._wanted: dict[str, tuple[Plan, Callable[[], bool]]] = {}
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    # Starting

    async def plan(self, wanted: CreateRequest, launch: Launch, runtime: Runtime, report: RuntimeReport) -> Plan | str:
        """The template that a kernel like this starts from, or why there can be none."""
        reason = obstacle(wanted, launch, report)
        if reason:
            return reason
        saving: Snapshots = runtime  # type: ignore[assignment]  # the report says so
        neutral = without_client(wanted, launch)
        key = key_of(
            neutral,
            preload=wanted.profile.preload,
            shape=saving.shape(neutral.spec),
            cores=cores(neutral.spec.limits, len(os.sched_getaffinity(0))),
            requirements=await saving.requirements(),
            link_version=VERSION,
        )
        return Plan(key, wanted.profile, neutral)

    async def find(self, wanted: CreateRequest, launch: Launch, runtime: Runtime, report: RuntimeReport) -> Start:
        """The template for a request, or why its kernel starts cold."""
        plan = await self.plan(wanted, launch, runtime, report)
        if isinstance(plan, str):
            return Start(reason=plan)
        snapshot = await asyncio.to_thread(self.builder.find, plan.key.digest)
        if snapshot is not None:
            return Start(Saved(snapshot), plan)
        return Start(None, plan, await asyncio.to_thread(self._missing, plan))

    def _missing(self, plan: Plan) -> str:
        record = self.records.get(plan.key.digest)
        if record is not None and record.retry_at > time.time():
            return f"its template could not be built: {record.reason}"
        return "its template is not built yet"

    def failed(self, start: Start, error: SandboxGatewayError) -> Start:
        """A start from the template failed: the cold start that follows. The template is suspect from now on, and
        given up when that happens again. Blocks for a moment."""
        assert start.saved is not None and start.plan is not None
        key, snapshot = start.plan.key, start.saved.snapshot
        log.warning("a start from template %s failed: %s", key.short, error.message)
        useless = error.code in _USELESS
        known = self.records.suspected(key.digest, snapshot.id, error.message, useless=useless)
        if known is not None and known.snapshot is None:
            self.builder.discard(snapshot.id)
        return Start(None, start.plan, f"its template failed: {error.message}")

    # Building

    def want(self, plan: Plan, still: Callable[[], bool]) -> None:
        """Have a template built in the background soon, unless it is there or could not be built lately.

        Only if it is ``still`` wanted then: a program that has ended its kernel by now is about to end itself.
        """
        if self._closed:
            return
        self._wanted[plan.key.digest] = (plan, still)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while self._wanted:
            await asyncio.sleep(self._delay)
            key, (plan, still) = next(iter(self._wanted.items()))
            try:
                record = await asyncio.to_thread(self.records.get, key)
                if still() and (record is None or record.retry_at <= time.time()):
                    await self.builder.build(plan, wait=False)
            except SandboxGatewayError as error:
                log.info("no template of profile %s: %s", plan.profile.name, error.message)
            except Exception:
                log.exception("the template of profile %s could not be built", plan.profile.name)
            finally:
                self._wanted.pop(key, None)

    async def build(self, plan: Plan, say: Callable[[str], None] | None = None, *, again: bool = False) -> Snapshot:
        """The template, built now unless it is there (or again in any case); see :meth:`Builder.build`."""
        return await self.builder.build(plan, say, again=again)

    def remove(self, record: TemplateRecord) -> bool:
        """Remove a template and forget it; False while somebody starts from it. Blocks."""
        if record.snapshot is not None and not self.builder.discard(record.snapshot):
            return False
        self.records.remove(record.key)
        return True

    async def close(self) -> None:
        """Stop building; what is half built is removed."""
        self._closed = True
        self._wanted.clear()
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
