"""Stand-in: the entry points that manifests name, served by Baton."""
