"""Label and annotation keys of both eras, and the ones of Kubernetes that we write. Names only, no logic."""

GROUP = "workloads.x-k8s.io"
NEW = "rbg.workloads.x-k8s.io/"
OLD = "rolebasedgroup.workloads.x-k8s.io/"

# labels, v1alpha2 era
GROUP_NAME = NEW + "group-name"
GROUP_UID = NEW + "group-uid"
GROUP_REVISION = NEW + "group-revision"
GROUP_UNIQUE_HASH = NEW + "group-unique-hash"
ROLE_NAME = NEW + "role-name"
ROLE_TYPE = NEW + "role-type"
ROLE_INSTANCE_NAME = NEW + "role-instance-name"
ROLE_INSTANCE_INDEX = NEW + "role-instance-index"
COMPONENT_NAME = NEW + "component-name"
COMPONENT_ID = NEW + "component-id"
COMPONENT_SIZE = NEW + "component-size"
COMPONENT_INDEX = NEW + "component-index"

# labels, v1alpha1 era
OLD_GROUP_NAME = OLD + "name"
OLD_ROLE_NAME = OLD + "role"
OLD_GROUP_UNIQUE_KEY = OLD + "group-unique-key"

# annotations
EXCLUSIVE_TOPOLOGY = NEW + "group-exclusive-topology"
OLD_EXCLUSIVE_TOPOLOGY = OLD + "exclusive-topology"
# written in examples that people copy, though no release ever read it
MISSPELT_EXCLUSIVE_TOPOLOGY = OLD + "group-exclusive-topology"
GANG_SCHEDULING = NEW + "group-gang-scheduling"
ROLE_INSTANCE_GANG_SCHEDULING = NEW + "role-instance-gang-scheduling"
ROLE_WORKLOAD_TYPE = NEW + "role-workload-type"
ROLE_INSTANCE_PATTERN = NEW + "role-instance-pattern"
ROLE_INPLACE_SCHEDULING = NEW + "role-inplace-scheduling"
INPLACE_UPDATE_STATE = NEW + "inplace-update-state"
PORT_ALLOCATOR = OLD + "port-allocator"
COMPONENT_DISCOVERY = OLD + "component-discovery"
COMPONENT_DEPENDS_ON = OLD + "component-depends-on"

# what an older version cannot say is kept here through a conversion
CONVERSION = "conversion.workloads.x-k8s.io/"
KEPT_POD_GROUP_POLICY = CONVERSION + "v1alpha1-pod-group-policy"
KEPT_COORDINATION = CONVERSION + "v1alpha1-coordination"
V1ALPHA1_RESIDUE = CONVERSION + "v1alpha1-residue"
V1ALPHA2_RESIDUE = CONVERSION + "v1alpha2-residue"

# Kubernetes' own
POD_INDEX = "apps.kubernetes.io/pod-index"
STATEFUL_POD_NAME = "statefulset.kubernetes.io/pod-name"
REVISION_HASH = "controller-revision-hash"
POD_TEMPLATE_HASH = "pod-template-hash"
SERVICE_NAME = "kubernetes.io/service-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
