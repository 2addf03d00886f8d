"""StatefulSet, Deployment and ReplicaSet, for clusters that have no kube-controller-manager (the embedded one)."""
