"""Ray's autoscaler, for which Ray has no public call: whether there is one, and whether it is at work."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get


def exists() -> bool:
    """Whether something may bring nodes."""
    return is_autoscaler_v2(fetch_from_server=True) or _names_node_types(_report())


def ask(bundles: Sequence[dict[str, float]]) -> None:
    """The cluster is to have room for these at the same time, in place of what was asked for before, by anyone."""
    request_resources(bundles=list(bundles))


def is_at_it() -> bool:
    """Whether nodes are coming, or were tried and may be tried again: not where none that it has would help."""
    if is_autoscaler_v2():
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return bool(status.pending_launches or status.pending_nodes or status.failed_launches)
    report = _report()
    known = (report.get("node_availability_summary") or {}).get("node_availabilities") or {}
    failed = report.get("failed_nodes") or [
        kind for kind, facts in known.items() if not facts.get("is_available", True)
    ]
    return bool(report.get("pending_launches") or report.get("pending_nodes") or failed)


def _report() -> dict[str, Any]:
    """What the monitor of the first version tells of itself. It runs on every head, with nothing to do on most."""
    status = _internal_kv_get(b"__autoscaling_status")
    return (json.loads(status).get("autoscaler_report") or {}) if status else {}


def _names_node_types(report: dict[str, Any]) -> bool:
    """A configured autoscaler names the type of each node; the others give each an id of its own for one."""
    types = (report.get("node_type_mapping") or {}).values()
    return any(not re.fullmatch(r"node_[0-9a-f]+", str(kind)) for kind in types)
