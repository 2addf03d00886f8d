"""Columns and cells of the built-in kinds' tables.

Owns `BUILTIN_TABLES`: kind -> (columns, function from object to cells). Pods are in `table_pods`. Not here: the Table
object.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from baton.cluster.apiserver.ages import age
from baton.cluster.apiserver.resources import Column
from baton.cluster.apiserver.table_pods import POD_COLUMNS, pod_cells

JSON = dict[str, Any]
Table = tuple[list[Column], Callable[[JSON], list[Any]]]
NONE = "<none>"


def columns(text: str) -> list[Column]:
    """`Name|Ready|Data:integer|IP*`: `*` marks wide columns, `:` a type that is not string."""
    out = []
    for word in text.split("|"):
        label, _, kind = word.rstrip("*").partition(":")
        form = "name" if label == "Name" else ""
        out.append(Column(label, kind or "string", form, priority=int(word.endswith("*"))))
    return out


def _born(obj: JSON) -> str:
    return age(obj["metadata"].get("creationTimestamp"))


def _name(obj: JSON) -> str:
    return str(obj["metadata"]["name"])


def _selector(selector: JSON | None) -> str:
    """A label selector (object or plain map) as people write it."""
    if not selector:
        return NONE
    plain = selector.get("matchLabels") if "matchLabels" in selector or "matchExpressions" in selector else selector
    parts = [f"{k}={v}" for k, v in sorted((plain or {}).items())]
    for e in selector.get("matchExpressions") or () if isinstance(selector.get("matchExpressions"), list) else ():
        values = ",".join(e.get("values") or ())
        text = {"In": f"{e['key']} in ({values})", "NotIn": f"{e['key']} notin ({values})"}
        parts.append(text.get(e["operator"], e["key"] if e["operator"] == "Exists" else f"!{e['key']}"))
    return ",".join(parts) or NONE


def _containers(obj: JSON) -> tuple[str, str]:
    items = (((obj.get("spec") or {}).get("template") or {}).get("spec") or {}).get("containers") or []
    return ",".join(c.get("name", "") for c in items), ",".join(c.get("image", "") for c in items)


def _service(o: JSON) -> list[Any]:
    spec = o.get("spec") or {}
    ingress = ((o.get("status") or {}).get("loadBalancer") or {}).get("ingress") or []
    external = list(spec.get("externalIPs") or ())
    kind = spec.get("type", "ClusterIP")
    if kind == "LoadBalancer":
        external += [i.get("ip") or i.get("hostname") or "" for i in ingress]
        shown = ",".join(external) or "<pending>"
    elif kind == "ExternalName":
        shown = spec.get("externalName", "")
    else:
        shown = ",".join(external) or NONE
    ports = []
    for p in spec.get("ports") or ():
        node = f":{p['nodePort']}" if p.get("nodePort") else ""
        ports.append(f"{p['port']}{node}/{p.get('protocol', 'TCP')}")
    address = spec.get("clusterIP") or NONE
    return [_name(o), kind, address, shown, ",".join(ports) or NONE, _born(o), _selector(spec.get("selector"))]


def _node(o: JSON) -> list[Any]:
    status, labels = o.get("status") or {}, o["metadata"].get("labels") or {}
    ready = next((c for c in status.get("conditions") or () if c.get("type") == "Ready"), None)
    words = ["Unknown" if ready is None else "Ready" if ready.get("status") == "True" else "NotReady"]
    if (o.get("spec") or {}).get("unschedulable"):
        words.append("SchedulingDisabled")
    prefix = "node-role.kubernetes.io/"
    roles = sorted(k.removeprefix(prefix) for k in labels if k.startswith(prefix) and k != prefix)
    by_type = {a["type"]: a["address"] for a in status.get("addresses") or ()}
    info = status.get("nodeInfo") or {}
    return [
        _name(o),
        ",".join(words),
        ",".join(roles) or NONE,
        _born(o),
        info.get("kubeletVersion", ""),
        by_type.get("InternalIP", NONE),
        by_type.get("ExternalIP", NONE),
        info.get("osImage") or "<unknown>",
        info.get("kernelVersion") or "<unknown>",
        info.get("containerRuntimeVersion") or "<unknown>",
    ]


def _stateful_set(o: JSON) -> list[Any]:
    ready = (o.get("status") or {}).get("readyReplicas", 0)
    return [_name(o), f"{ready}/{(o.get('spec') or {}).get('replicas', 0)}", _born(o), *_containers(o)]


def _deployment(o: JSON) -> list[Any]:
    spec, status = o.get("spec") or {}, o.get("status") or {}
    ready = f"{status.get('readyReplicas', 0)}/{spec.get('replicas', 0)}"
    counts = [status.get("updatedReplicas", 0), status.get("availableReplicas", 0)]
    return [_name(o), ready, *counts, _born(o), *_containers(o), _selector(spec.get("selector"))]


def _replica_set(o: JSON) -> list[Any]:
    spec, status = o.get("spec") or {}, o.get("status") or {}
    counts = [spec.get("replicas", 0), status.get("replicas", 0), status.get("readyReplicas", 0)]
    return [_name(o), *counts, _born(o), *_containers(o), _selector(spec.get("selector"))]


def _event(o: JSON) -> list[Any]:
    series, source, about = o.get("series") or {}, o.get("source") or {}, o.get("involvedObject") or {}
    first = o.get("firstTimestamp") or o.get("eventTime")
    last = series.get("lastObservedTime") or o.get("lastTimestamp") or first
    component = source.get("component") or o.get("reportingComponent") or ""
    origin = ", ".join(filter(None, (component, source.get("host") or o.get("reportingInstance"))))
    target = f"{about.get('kind', '').lower()}/{about.get('name', '')}"
    path = about.get("fieldPath", "")
    count = series.get("count") or o.get("count") or 1
    message = (o.get("message") or "").strip()
    return [
        age(last),
        o.get("type", ""),
        o.get("reason", ""),
        target,
        path,
        origin,
        message,
        age(first),
        count,
        _name(o),
    ]


def _claim(o: JSON) -> list[Any]:
    spec, status = o.get("spec") or {}, o.get("status") or {}
    bound = bool(spec.get("volumeName"))
    phase = "Terminating" if o["metadata"].get("deletionTimestamp") else status.get("phase", "")
    capacity = (status.get("capacity") or {}).get("storage", "") if bound else ""
    modes = _modes(status.get("accessModes")) if bound else ""
    volume_mode = spec.get("volumeMode") or "<unset>"
    attributes = spec.get("volumeAttributesClassName") or "<unset>"
    storage = spec.get("storageClassName") or ""
    return [_name(o), phase, spec.get("volumeName", ""), capacity, modes, storage, attributes, _born(o), volume_mode]


def _modes(modes: list[str] | None) -> str:
    short = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX", "ReadWriteOncePod": "RWOP"}
    return ",".join(short.get(m, m) for m in modes or ())


def _volume(o: JSON) -> list[Any]:
    spec, status = o.get("spec") or {}, o.get("status") or {}
    claim = spec.get("claimRef") or {}
    phase = "Terminating" if o["metadata"].get("deletionTimestamp") else status.get("phase", "")
    return [
        _name(o),
        (spec.get("capacity") or {}).get("storage", ""),
        _modes(spec.get("accessModes")),
        spec.get("persistentVolumeReclaimPolicy", ""),
        phase,
        f"{claim.get('namespace', '')}/{claim.get('name', '')}" if claim else "",
        spec.get("storageClassName", ""),
        spec.get("volumeAttributesClassName") or "<unset>",
        status.get("reason", ""),
        _born(o),
        spec.get("volumeMode") or "<unset>",
    ]


def _cut(items: list[str]) -> str:
    more = f" + {len(items) - 3} more..." if len(items) > 3 else ""
    return ",".join(items[:3]) + more if items else "<unset>"


def _endpoint_slice(o: JSON) -> list[Any]:
    ports = [str(p["port"]) if p.get("port") is not None else "*" for p in o.get("ports") or ()]
    addresses = [a for e in o.get("endpoints") or () for a in e.get("addresses") or ()]
    return [_name(o), o.get("addressType", ""), _cut(ports), _cut(addresses), _born(o)]


def _endpoints(o: JSON) -> list[Any]:
    pairs = []
    for subset in o.get("subsets") or ():
        for address in subset.get("addresses") or ():
            ports = subset.get("ports") or ()
            pairs += [f"{address['ip']}:{p['port']}" for p in ports] or [address["ip"]]
    more = f" + {len(pairs) - 3} more..." if len(pairs) > 3 else ""
    return [_name(o), ",".join(pairs[:3]) + more if pairs else NONE, _born(o)]


def _revision(o: JSON) -> list[Any]:
    owner = next((r for r in o["metadata"].get("ownerReferences") or () if r.get("controller")), None)
    shown = NONE
    if owner:
        group = owner["apiVersion"].rpartition("/")[0]
        shown = f"{owner['kind'].lower()}{'.' + group if group else ''}/{owner['name']}"
    return [_name(o), shown, o.get("revision", 0), _born(o)]


def _storage_class(o: JSON) -> list[Any]:
    marked = (o["metadata"].get("annotations") or {}).get("storageclass.kubernetes.io/is-default-class") == "true"
    return [
        _name(o) + (" (default)" if marked else ""),
        o.get("provisioner", ""),
        o.get("reclaimPolicy", "Delete"),
        o.get("volumeBindingMode", "Immediate"),
        bool(o.get("allowVolumeExpansion")),
        _born(o),
    ]


def _namespace(o: JSON) -> list[Any]:
    return [_name(o), (o.get("status") or {}).get("phase", "Active"), _born(o)]


def _config_map(o: JSON) -> list[Any]:
    return [_name(o), len(o.get("data") or {}) + len(o.get("binaryData") or {}), _born(o)]


BUILTIN_TABLES: dict[str, Table] = {
    "Pod": (POD_COLUMNS, pod_cells),
    "Service": (columns("Name|Type|Cluster-IP|External-IP|Port(s)|Age|Selector*"), _service),
    "Endpoints": (columns("Name|Endpoints|Age"), _endpoints),
    "EndpointSlice": (columns("Name|AddressType|Ports|Endpoints|Age"), _endpoint_slice),
    "Node": (
        columns("Name|Status|Roles|Age|Version|Internal-IP*|External-IP*|OS-Image*|Kernel-Version*|Container-Runtime*"),
        _node,
    ),
    "StatefulSet": (columns("Name|Ready|Age|Containers*|Images*"), _stateful_set),
    "Deployment": (
        columns("Name|Ready|Up-to-date:integer|Available:integer|Age|Containers*|Images*|Selector*"),
        _deployment,
    ),
    "ReplicaSet": (
        columns("Name|Desired:integer|Current:integer|Ready:integer|Age|Containers*|Images*|Selector*"),
        _replica_set,
    ),
    "Event": (
        columns("Last Seen|Type|Reason|Object|Subobject*|Source*|Message|First Seen*|Count:integer*|Name*"),
        _event,
    ),
    "ConfigMap": (columns("Name|Data:integer|Age"), _config_map),
    "Secret": (
        columns("Name|Type|Data:integer|Age"),
        lambda o: [_name(o), o.get("type", ""), len(o.get("data") or {}), _born(o)],
    ),
    "Namespace": (columns("Name|Status|Age"), _namespace),
    "PersistentVolumeClaim": (
        columns("Name|Status|Volume|Capacity|Access Modes|StorageClass|VolumeAttributesClass|Age|VolumeMode*"),
        _claim,
    ),
    "PersistentVolume": (
        columns(
            "Name|Capacity|Access Modes|Reclaim Policy|Status|Claim|StorageClass|VolumeAttributesClass|Reason|Age|VolumeMode*"
        ),
        _volume,
    ),
    "ControllerRevision": (columns("Name|Controller|Revision:integer|Age"), _revision),
    "Lease": (
        columns("Name|Holder|Age"),
        lambda o: [_name(o), (o.get("spec") or {}).get("holderIdentity") or "", _born(o)],
    ),
    "StorageClass": (
        columns("Name|Provisioner|ReclaimPolicy|VolumeBindingMode|AllowVolumeExpansion:boolean|Age"),
        _storage_class,
    ),
    "ServiceAccount": (columns("Name|Age"), lambda o: [_name(o), _born(o)]),
    "CustomResourceDefinition": (
        columns("Name|Created At"),
        lambda o: [_name(o), o["metadata"].get("creationTimestamp", "")],
    ),
}
