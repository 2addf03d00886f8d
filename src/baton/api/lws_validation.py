"""What must hold of a LeaderWorkerSet beyond its schema, on create and on update. Paths and texts are upstream's.

Upstream's own rules come first; the ones added here (names that do not fit, templates without containers) are things
that fail later on a cluster.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from baton.api.common import IntOrPercent
from baton.api.lws import SUBGROUP_EXCLUSIVE_TOPOLOGY, LeaderWorkerSet, LeaderWorkerTemplate, Spec, worker_name
from baton.api.resources import Object
from baton.api.validation import pod_template_errors
from baton.api.wire import FieldError, InvalidObjectError

_MAX_REPLICAS = 1_000_000
_MAX_INT32 = 2**31 - 1
_MAX_HOST_NAME = 63
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_PERCENT = re.compile(r"[0-9]+%")
_ROLLING = "spec.rolloutStrategy.rollingUpdateConfiguration"
_SUBGROUP_SIZE = "spec.leaderWorkerTemplate.subGroupPolicy.subGroupSize"


def validate(obj: Object, old: Object | None = None) -> list[FieldError]:
    """Everything wrong with a set as its author wrote it; ``old`` is the stored object on update."""
    try:
        found = LeaderWorkerSet.parse(obj)
    except InvalidObjectError as error:
        return error.errors
    spec = found.spec
    errors = [*_name(found.metadata, spec), *_counts(spec), *_rollout(spec), *_subgroups(found.metadata, spec)]
    errors += _templates(spec.leader_worker_template)
    if old is not None:
        errors += _update(obj, old, spec)
    return errors


def _invalid(field: str, value: object, text: str) -> FieldError:
    return FieldError(field, f"Invalid value: {json.dumps(value)}: {text}")


def _name(meta: Object, spec: Spec) -> Iterator[FieldError]:
    name = str(meta.get("name") or "")
    if not name:
        return  # generateName: the server makes a name and checks it
    if not _DNS_1035.fullmatch(name) or len(name) > _MAX_HOST_NAME:
        yield _invalid(
            "metadata.name",
            name,
            "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic "
            "character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123'), at most 63 characters",
        )
        return
    longest = worker_name(name, max(spec.replicas - 1, 0), max(spec.leader_worker_template.size - 1, 0))
    if len(longest) > _MAX_HOST_NAME:
        text = f"pods would be called {longest}, {len(longest)} characters; a host name has at most {_MAX_HOST_NAME}"
        yield _invalid("metadata.name", name, text)


def _counts(spec: Spec) -> Iterator[FieldError]:
    size, replicas = spec.leader_worker_template.size, spec.replicas
    if replicas < 0:
        yield _invalid("spec.replicas", replicas, "replicas must be equal or greater than 0")
    if replicas > _MAX_REPLICAS:
        yield _invalid("spec.replicas", replicas, f"replicas must be equal or less than {_MAX_REPLICAS}")
    if size < 1:
        yield _invalid("spec.leaderWorkerTemplate.size", size, "size must be equal or greater than 1")
    if replicas * size > _MAX_INT32:
        text = f"the product of replicas and worker replicas must not exceed {_MAX_INT32}"
        yield _invalid("spec.replicas", replicas, text)


def _rollout(spec: Spec) -> Iterator[FieldError]:
    update = spec.rollout_strategy.rolling_update_configuration
    yield from _bound("maxUnavailable", update.max_unavailable)
    yield from _bound("maxSurge", update.max_surge)
    if update.partition < 0:
        yield _invalid(f"{_ROLLING}.partition", update.partition, "must be greater than or equal to 0")
    # A percentage that only rounds to 0 is let in (upstream: not), or an autoscaler could make a set invalid.
    if spec.replicas and update.max_unavailable in (0, "0%") and update.max_surge in (0, "0%"):
        yield _invalid(f"{_ROLLING}.maxUnavailable", update.max_unavailable, "must not be 0 when `maxSurge` is 0")


def _bound(field: str, value: IntOrPercent) -> Iterator[FieldError]:
    path = f"{_ROLLING}.{field}"
    if isinstance(value, int):
        if value < 0:
            yield _invalid(path, value, "must be greater than or equal to 0")
    elif not _PERCENT.fullmatch(value):
        text = "a valid percent string must be a numeric string followed by an ending '%'"
        yield _invalid(path, value, f"{text} (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')")
    elif int(value[:-1]) > 100:
        yield _invalid(path, value, "must not be greater than 100%")


def _subgroups(meta: Object, spec: Spec) -> Iterator[FieldError]:
    template = spec.leader_worker_template
    policy = template.sub_group_policy
    if policy is None:
        annotations = meta.get("annotations") or {}
        if SUBGROUP_EXCLUSIVE_TOPOLOGY in annotations:
            yield _invalid(
                f"metadata.annotations.{SUBGROUP_EXCLUSIVE_TOPOLOGY}",
                annotations[SUBGROUP_EXCLUSIVE_TOPOLOGY],
                "cannot have subgroup-exclusive-topology without subGroupSize set",
            )
        return
    count, size = policy.sub_group_size, template.size
    if count is None:
        yield FieldError(_SUBGROUP_SIZE, "Required value", "FieldValueRequired")
        return
    if count < 1:
        yield _invalid(_SUBGROUP_SIZE, count, "subGroupSize must be equal or greater than 1")
        return
    if size % count and (size - 1) % count:
        yield _invalid(_SUBGROUP_SIZE, count, "size or size - 1 must be divisible by subGroupSize")
    if size < count:
        yield _invalid(_SUBGROUP_SIZE, count, "subGroupSize cannot be larger than size")
    if policy.sub_group_policy_type == "LeaderExcluded" and (size - 1) % count:
        yield _invalid(_SUBGROUP_SIZE, count, "size-1 must be divisible by subGroupSize when using LeaderExcluded")


def _templates(template: LeaderWorkerTemplate) -> Iterator[FieldError]:
    path = "spec.leaderWorkerTemplate"
    claims: set[str] = set()
    for index, claim in enumerate(template.volume_claim_templates):
        meta = claim.get("metadata")
        name = meta.get("name") if isinstance(meta, dict) else None
        if not isinstance(name, str) or not name:
            where = f"{path}.volumeClaimTemplates[{index}].metadata.name"
            yield FieldError(where, "Required value", "FieldValueRequired")
        else:
            claims.add(name)
        if not isinstance(claim.get("spec"), dict):
            yield FieldError(f"{path}.volumeClaimTemplates[{index}].spec", "Required value", "FieldValueRequired")
    if template.leader_template is not None:
        yield from pod_template_errors(template.leader_template, f"{path}.leaderTemplate", claims)
    yield from pod_template_errors(template.worker_template, f"{path}.workerTemplate", claims)


def _update(obj: Object, old: Object, spec: Spec) -> Iterator[FieldError]:
    try:
        before = LeaderWorkerSet.parse(old).spec.leader_worker_template.sub_group_policy
    except InvalidObjectError:
        return  # stored by a server without these rules: nothing to hold the new one to
    after = spec.leader_worker_template.sub_group_policy
    if after is not None and before is None:
        yield _invalid(
            _SUBGROUP_SIZE, after.sub_group_size, "cannot enable subGroupSize after the lws is already created"
        )
    elif after is None and before is not None:
        yield _invalid(_SUBGROUP_SIZE, before.sub_group_size, "cannot remove subGroupSize after enabled")
    elif after is not None and before is not None and after.sub_group_size != before.sub_group_size:
        yield _invalid(_SUBGROUP_SIZE, after.sub_group_size, "field is immutable")
    network = obj["spec"].get("networkConfig")
    if isinstance(network, dict) and network.get("subdomainPolicy") is None:
        yield _invalid("spec.networkConfig.subdomainPolicy", None, "cannot set subdomainPolicy as null")
