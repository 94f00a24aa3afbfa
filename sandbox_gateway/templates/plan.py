"""From a request to the template that it could start from: the key, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sandbox_gateway import identity
from sandbox_gateway import request as requests
from sandbox_gateway.model import Launch
from sandbox_gateway.profiles import Profile
from sandbox_gateway.profiles.profile import is_ipykernel
from sandbox_gateway.request import CreateRequest
from sandbox_gateway.runtimes.base import RuntimeReport
from sandbox_gateway.suspension import Saved
from sandbox_gateway.templates.key import TemplateKey


@dataclass(frozen=True, slots=True)
class Plan:
    """A template that could exist: what is needed to build it, or to start from it."""

    key: TemplateKey
    profile: Profile
    launch: Launch
    """Of the request, without the client's part of the environment."""


@dataclass(frozen=True, slots=True)
class Start:
    """How a kernel can be started."""

    saved: Saved | None = None
    """The template; None for a cold start."""
    plan: Plan | None = None
    """What would have to be built; None where no template can be."""
    reason: str = ""
    """Why the start is a cold one, for people."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the sandbox's record says of it."""
        return (f"started cold: {self.reason}",) if self.reason else ()


def obstacle(wanted: CreateRequest, launch: Launch, report: RuntimeReport) -> str:
    """Why a kernel cannot start from any template, in a few words; empty when it can."""
    profile = wanted.profile
    if not is_ipykernel(launch.kernel.argv):
        return "only ipykernel can be given an identity after it has started"
    if not profile.template:
        return "the profile has template = false"
    capability = report.get("snapshots")
    if not capability.available or capability.reason:
        return f"the {profile.runtime} runtime cannot multiply what it has saved: {capability.reason}"
    image = launch.spec.image
    if any(layer.digest is None for layer in (*image.layers, *((image.agent,) if image.agent is not None else ()))):
        return "the image is a live view of this machine, which may change below a template"
    theirs = identity.out_of_reach(without_client(wanted, launch).kernel.environment, launch.kernel.environment)
    if theirs:
        return f"{', '.join(theirs)} of the client's environment only act at the start of the interpreter"
    return ""


def without_client(wanted: CreateRequest, launch: Launch) -> Launch:
    """``launch`` as it is when the client hands in nothing."""
    if not wanted.client_environment:
        return launch
    neutral = requests.kernel(replace(wanted, client_environment={}), launch.spec.image)
    return replace(launch, kernel=neutral)
