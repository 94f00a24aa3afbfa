"""What the REST routes show of things, as JSON, under the names of ``jupyter sandbox ps --json`` where it has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from sandbox_gateway.choices import TIERS, choice_schema
from sandbox_gateway.clones import ForkOutcome
from sandbox_gateway.events import Event
from sandbox_gateway.model import NOT_ISOLATED, Idle, Limits, SandboxRecord, timestamp
from sandbox_gateway.profiles import Profile
from sandbox_gateway.quotas import Quota, Usage
from sandbox_gateway.runtimes.base import Stats
from sandbox_gateway.server.callers import Caller
from sandbox_gateway.server.gateway import Start
from sandbox_gateway.snapshots import Snapshot


def sandbox(
    record: SandboxRecord,
    limits: Limits | None = None,
    kernel: Mapping[str, Any] | None = None,
    used: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A sandbox; ``kernel`` is Jupyter's model of its kernel, ``used`` its :func:`usage`."""
    return {
        "id": record.id,
        "state": str(record.state),
        "profile": record.profile,
        "owner": record.owner,
        "name": record.name,
        "runtime": record.runtime,
        "isolated": record.runtime not in NOT_ISOLATED,
        "created": timestamp(record.created),
        "since": timestamp(record.changed),
        "memory": None if used is None else used["memory"],
        "usage": None if used is None else dict(used),
        "limits": None if limits is None else asdict(limits),
        "idle": None if record.idle is None else _idle(record.idle),
        "parent": record.parent,
        "snapshot": record.snapshot,
        "on_owner_exit": str(record.on_owner_exit),
        "death": None if record.death is None else {**record.death.as_dict(), "reason": record.death.describe()},
        "notes": list(record.notes),
        "kernel": None if kernel is None else _kernel(kernel),
    }


def usage(stats: Stats, saved: int | None = None) -> dict[str, Any]:
    """What a sandbox uses now; ``saved`` are the bytes that it is suspended in."""
    return {
        "memory": stats.memory,
        "cpu_seconds": stats.cpu_seconds,
        "disk": stats.disk,
        "saved": saved,
        "gpu": None if stats.gpu is None else asdict(stats.gpu),
    }


def quota(owner: str, allowed: Quota, used: Usage, made: int) -> dict[str, Any]:
    """What a user has of what he may have; the memory is that of limits, and not known where one has none."""
    memory = [one.memory for one in used.live]
    counts: dict[str, int | None] = {
        "live": len(used.live),
        "suspended": len(used.suspended),
        "memory": None if None in memory else sum(each or 0 for each in memory),
        "disk": used.disk,
        "gpus": sum(one.gpus for one in used.live),
        "creates_per_minute": made,
    }
    return {
        "owner": owner,
        **{name: {"used": count, "limit": getattr(allowed, name)} for name, count in counts.items()},
    }


def snapshot(found: Snapshot, owner: str, published: bool, caller: Caller) -> dict[str, Any]:
    """A snapshot; of a published one of another's its origin is not shown."""
    manifest, own = found.manifest, caller.may_use(owner)
    return {
        "id": found.id,
        "name": found.name,
        "owner": owner,
        "published": published,
        "sandbox": manifest.sandbox if own else None,
        "profile": manifest.profile,
        "runtime": manifest.runtime,
        "parent": manifest.parent if own else None,
        "created": timestamp(manifest.created),
        "size": found.size,
    }


def profile(found: Profile, start: Start) -> dict[str, Any]:
    """An offer, without what is the administrator's own business: mounts' places and variables' values."""
    return {
        "name": found.name,
        "display_name": found.display_name or found.name,
        "description": found.description,
        "language": found.language,
        "interrupt_mode": found.interrupt_mode,
        "runtime": found.runtime,
        "isolated": found.runtime not in NOT_ISOLATED,
        "image": found.image,
        "workspace": str(found.workspace),
        "limits": asdict(found.limits),
        "idle": _idle(found.idle),
        "network": "none",
        "start": asdict(start),
        "client_environment": list(found.client_environment),
        "active_output": found.active_output,
        "choices": choice_schema(found),
    }


def children(outcomes: list[ForkOutcome]) -> dict[str, Any]:
    """What became of a fork."""
    return {
        "children": [
            {"id": outcome.id, "error": None if outcome.error is None else outcome.error.as_dict()}
            for outcome in outcomes
        ]
    }


def event(found: Event) -> dict[str, Any]:
    """What happened."""
    return {**found.as_dict(), "time": timestamp(found.time)}


def _idle(idle: Idle) -> dict[str, Any]:
    return {tier: getattr(idle, tier) for tier in TIERS}


def _kernel(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: model.get(key) for key in ("execution_state", "last_activity", "connections")}
