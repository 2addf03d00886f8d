"""Binding claims to volumes, for clusters without kube-controller-manager."""
