"""The embedded cluster: an API server, a scheduler, a node agent, services and volumes on one machine."""
