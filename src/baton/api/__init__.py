"""Kubernetes resource types of ours, and facts about those of others. Pure: no I/O, no clock, nothing of ours imported.

Front door: :func:`validate`, :func:`convert`, :func:`to_stored`, :func:`crd_manifests`, the modules `names` and `labels`,
and the table in `resources`. Built-in kinds stay plain dicts; RoleBasedGroup is typed in `v1alpha1` and `v1alpha2`,
LeaderWorkerSet in `lws` (rules: `lws_validation`).
"""

from baton.api.conversion import convert
from baton.api.crd import crd_manifests
from baton.api.resources import Object, Resource
from baton.api.validation import to_stored, unknown, validate
from baton.api.wire import FieldError, InvalidObjectError

__all__ = [
    "FieldError",
    "InvalidObjectError",
    "Object",
    "Resource",
    "convert",
    "crd_manifests",
    "to_stored",
    "unknown",
    "validate",
]
