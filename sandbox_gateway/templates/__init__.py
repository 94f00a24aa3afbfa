"""Templates: snapshots of ready kernels that have no identity yet, from which new kernels start (DESIGN 4.4).

:class:`Templates` is the way in: it finds the template for a request, or says why the kernel starts cold, and builds
what is missing. What decides whether a template fits is in :mod:`~sandbox_gateway.templates.key`, what a template is
made of in :mod:`~sandbox_gateway.templates.blank`, what is known of each in :mod:`~sandbox_gateway.templates.records`.
"""

from sandbox_gateway.templates.builder import Builder, Maker
from sandbox_gateway.templates.key import TemplateKey
from sandbox_gateway.templates.plan import Plan, Start
from sandbox_gateway.templates.pool import Member, Pool
from sandbox_gateway.templates.records import TemplateRecord, TemplateRecords
from sandbox_gateway.templates.service import Templates

__all__ = [
    "Builder",
    "Maker",
    "Member",
    "Plan",
    "Pool",
    "Start",
    "TemplateKey",
    "TemplateRecord",
    "TemplateRecords",
    "Templates",
]
