"""What must hold of a RoleBasedGroup beyond its schema, and what we refuse because it is not supported yet.

:func:`validate` is the one front door: shape, rules, and support, every finding with its field path and what to do.
Unsupported features are refused rather than ignored; each has one entry in `support`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from baton.api import names, v1alpha1, v1alpha2
from baton.api.common import Role, RoleTemplate, RollingUpdate, normal_update_type
from baton.api.conversion import convert
from baton.api.merge import strategic_merge
from baton.api.quantity import resolve_count
from baton.api.resources import Object
from baton.api.support import unsupported
from baton.api.wire import FieldError, InvalidObjectError, Model, unknown_fields

AnyGroup = v1alpha1.RoleBasedGroup | v1alpha2.RoleBasedGroup
# a pod called {group}-{role}-{ordinal} needs room for the ordinal in a 63 character host name
_ORDINAL_ROOM = 5
_PROVIDED = (names.DISCOVERY_VOLUME,)


def parse(obj: Object) -> AnyGroup:
    """The typed group, of either version. Raises :class:`InvalidObjectError`."""
    version = obj.get("apiVersion")
    if obj.get("kind") != "RoleBasedGroup" or version not in (v1alpha1.API_VERSION, v1alpha2.API_VERSION):
        raise InvalidObjectError(
            [
                FieldError(
                    "apiVersion",
                    f"is {version!r}; RoleBasedGroup has {v1alpha1.API_VERSION} and {v1alpha2.API_VERSION}",
                )
            ]
        )
    kind: type[v1alpha1.RoleBasedGroup] | type[v1alpha2.RoleBasedGroup]
    kind = v1alpha1.RoleBasedGroup if version == v1alpha1.API_VERSION else v1alpha2.RoleBasedGroup
    return kind.parse(obj)


def validate(obj: Object) -> list[FieldError]:
    """Everything wrong with a group as its author wrote it, in the order of the manifest; empty when it can run."""
    try:
        group = parse(obj)
    except InvalidObjectError as error:
        return error.errors
    errors = list(_metadata(group.metadata))
    errors += _roles(group)
    errors += _templates(group)
    if not errors:
        errors += unsupported(group)
    return errors


def unknown(obj: Object) -> list[str]:
    """Paths of fields that no version of the type has; they are stored but mean nothing."""
    try:
        group = parse(obj)
    except InvalidObjectError:
        return []
    return list(unknown_fields(group.spec, "spec"))


def to_stored(obj: Object) -> v1alpha2.RoleBasedGroup:
    """The group as controllers read it: v1alpha2, typed. Raises :class:`InvalidObjectError`."""
    parse(obj)
    return v1alpha2.RoleBasedGroup.parse(convert(obj, "v1alpha2"))


def _metadata(meta: Object) -> Iterator[FieldError]:
    name = str(meta.get("name") or meta.get("generateName") or "")
    label = name.rstrip("-") if "name" not in meta else name
    if not names.is_dns_label(label):
        yield FieldError(
            "metadata.name",
            f"{name!r} must be a DNS label: lower-case letters, digits and '-', at most 63 characters, no dot",
        )


def _roles(group: AnyGroup) -> Iterator[FieldError]:
    seen: dict[str, int] = {}
    group_name = str(group.metadata.get("name") or "")
    for index, role in enumerate(group.spec.roles):
        path = f"spec.roles[{index}]"
        if role.name in seen:
            first = f"spec.roles[{seen[role.name]}]"
            yield FieldError(
                f"{path}.name", f"{role.name!r} is also {first}; role names must differ", "FieldValueDuplicate"
            )
        seen.setdefault(role.name, index)
        if not names.is_dns_label(role.name):
            yield FieldError(f"{path}.name", f"{role.name!r} must be a DNS label: lower-case letters, digits and '-'")
        elif len(f"{group_name}-{role.name}") > 63 - _ORDINAL_ROOM:
            length = len(f"{group_name}-{role.name}")
            yield FieldError(
                f"{path}.name",
                f"pod names {group_name}-{role.name}-<n> would be {length} characters before the ordinal; "
                f"at most {63 - _ORDINAL_ROOM} fit a host name, so shorten the role or the group",
            )
        yield from _rollout(role, f"{path}.rolloutStrategy.rollingUpdate")
    yield from _dependencies(group)


def _rollout(role: Role, path: str) -> Iterator[FieldError]:
    update: RollingUpdate = role.rollout_strategy.rolling_update
    if normal_update_type(update.type) is None:
        known = "RecreatePod, InPlaceIfPossible, InPlaceOnly"
        yield FieldError(f"{path}.type", f"{update.type!r} is not one of {known}", "FieldValueNotSupported")
    counts: dict[str, int] = {}
    for field, value, round_up in (
        ("maxUnavailable", update.max_unavailable, False),
        ("maxSurge", update.max_surge, True),
        ("partition", update.partition, True),
    ):
        try:
            counts[field] = resolve_count(value, role.replicas, round_up=round_up)
        except ValueError as error:
            yield FieldError(f"{path}.{field}", str(error))
    if len(counts) < 3:
        return
    both_zero = update.max_unavailable in (0, "0", "0%") and update.max_surge in (0, "0", "0%")
    if both_zero:
        yield FieldError(f"{path}.maxUnavailable", "must not be 0 when maxSurge is 0: no pod could ever be updated")
    # ordinals start at 0, so a partition of 0 is no partition, whatever the number of replicas
    if 0 < role.replicas <= counts["partition"]:
        yield FieldError(f"{path}.partition", f"{update.partition!r} must be less than replicas ({role.replicas})")


def _dependencies(group: AnyGroup) -> Iterator[FieldError]:
    graph = {role.name: role.dependencies for role in group.spec.roles}
    complete = True
    for index, role in enumerate(group.spec.roles):
        for number, dependency in enumerate(role.dependencies):
            if dependency not in graph:
                complete = False
                yield FieldError(
                    f"spec.roles[{index}].dependencies[{number}]",
                    f"no role is called {dependency!r}; there are {', '.join(graph)}",
                    "FieldValueNotFound",
                )
    if complete:
        cycle = find_cycle(graph)
        if cycle:
            index = [role.name for role in group.spec.roles].index(cycle[0])
            path = " -> ".join([*cycle, cycle[0]])
            yield FieldError(
                f"spec.roles[{index}].dependencies", f"roles wait for each other: {path}; remove one of these"
            )


def find_cycle(graph: dict[str, list[str]]) -> list[str]:
    """Names along one cycle of "depends on", or nothing. Depth first, without recursion; unknown names are skipped."""
    done: set[str] = set()
    for root in graph:
        trail: list[str] = []
        stack: list[tuple[str, bool]] = [(root, False)]
        while stack:
            name, leaving = stack.pop()
            if leaving:
                trail.pop()
                done.add(name)
            elif name in trail:
                return trail[trail.index(name) :]
            elif name not in done and name in graph:
                trail.append(name)
                stack.append((name, True))
                stack += [(dependency, False) for dependency in reversed(graph[name])]
    return []


def _templates(group: AnyGroup) -> Iterator[FieldError]:
    shared: dict[str, RoleTemplate] = {}
    for index, template in enumerate(group.spec.role_templates):
        path = f"spec.roleTemplates[{index}]"
        if not names.is_dns_label(template.name):
            yield FieldError(f"{path}.name", f"{template.name!r} must be a DNS label")
        if template.name in shared:
            yield FieldError(f"{path}.name", f"{template.name!r} is defined twice", "FieldValueDuplicate")
        shared[template.name] = template
        yield from pod_template_errors(template.template, f"{path}.template", _PROVIDED)
    for index, role in enumerate(group.spec.roles):
        yield from _role_source(role, f"spec.roles[{index}]", shared)


def _role_source(role: Role, path: str, shared: dict[str, RoleTemplate]) -> Iterator[FieldError]:
    """Where a role's pods come from: exactly one pattern, in it exactly one of template and templateRef."""
    if isinstance(role, v1alpha2.RoleSpec):
        patterns = {
            "standalonePattern": role.standalone_pattern,
            "leaderWorkerPattern": role.leader_worker_pattern,
            "customComponentsPattern": role.custom_components_pattern,
        }
        used = [name for name, pattern in patterns.items() if pattern is not None]
        if len(used) != 1:
            text = f"has {' and '.join(used)}; keep one" if used else f"needs one of {', '.join(patterns)}"
            yield FieldError(path, text, "FieldValueInvalid" if used else "FieldValueRequired")
            return
        pattern = patterns[used[0]]
        if isinstance(pattern, v1alpha2.TemplateSource):
            reference = pattern.template_ref
            patch_path = f"{path}.{used[0]}.templateRef.patch"
            yield from _source(
                pattern.template,
                reference,
                reference.patch if reference else None,
                f"{path}.{used[0]}",
                patch_path,
                shared,
            )
    elif isinstance(role, v1alpha1.RoleSpec) and not role.components:
        yield from _source(role.template, role.template_ref, role.template_patch, path, f"{path}.templatePatch", shared)


def _source(
    template: Object | None,
    reference: v1alpha1.TemplateRef | v1alpha2.TemplateRef | None,
    patch: Object | None,
    path: str,
    patch_path: str,
    shared: dict[str, RoleTemplate],
) -> Iterator[FieldError]:
    if (template is None) == (reference is None):
        text = "has template and templateRef; keep one" if template is not None else "needs template or templateRef"
        yield FieldError(path, text, "FieldValueInvalid" if template is not None else "FieldValueRequired")
    elif template is not None:
        yield from pod_template_errors(template, f"{path}.template", _PROVIDED)
    elif reference is not None:
        if reference.name not in shared:
            text = f"no roleTemplates entry is called {reference.name!r}; there are {', '.join(shared) or 'none'}"
            yield FieldError(f"{path}.templateRef.name", text, "FieldValueNotFound")
        elif patch is None:
            yield FieldError(patch_path, "is required with templateRef; write {} for no change", "FieldValueRequired")
        else:
            try:
                strategic_merge(shared[reference.name].template, patch)
            except ValueError as error:
                yield FieldError(patch_path, str(error))


def pod_template_errors(template: Object, path: str, provided: Collection[str]) -> Iterator[FieldError]:
    """The little we check of a pod ourselves; the API server checks the rest when the pod is made. ``provided``: volumes
    that the pod will have without saying so."""
    spec = template.get("spec")
    if not isinstance(spec, dict):
        yield FieldError(f"{path}.spec", "is required and must be a mapping", "FieldValueRequired")
        return
    containers = spec.get("containers")
    if not isinstance(containers, list) or not containers:
        yield FieldError(f"{path}.spec.containers", "needs at least one container", "FieldValueRequired")
        return
    seen: set[str] = set()
    volumes = {volume.get("name") for volume in spec.get("volumes") or [] if isinstance(volume, dict)}
    for index, container in enumerate(containers):
        at = f"{path}.spec.containers[{index}]"
        if not isinstance(container, dict) or not isinstance(container.get("name"), str):
            yield FieldError(f"{at}.name", "is required and must be a string", "FieldValueRequired")
            continue
        if container["name"] in seen:
            yield FieldError(f"{at}.name", f"{container['name']!r} is used twice", "FieldValueDuplicate")
        seen.add(container["name"])
        for number, mount in enumerate(container.get("volumeMounts") or []):
            name = mount.get("name") if isinstance(mount, dict) else None
            if name not in volumes and name not in provided:
                text = f"no volume of the pod is called {name!r}; there are {', '.join(sorted(map(str, volumes))) or 'none'}"
                yield FieldError(f"{at}.volumeMounts[{number}].name", text, "FieldValueNotFound")


__all__ = [
    "AnyGroup",
    "FieldError",
    "InvalidObjectError",
    "Model",
    "find_cycle",
    "parse",
    "to_stored",
    "unknown",
    "validate",
]
