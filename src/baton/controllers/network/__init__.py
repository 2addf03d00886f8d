"""EndpointSlices of Services with selectors, for clusters without kube-controller-manager."""
