"""Published weights: manifests, content-addressed payloads and where they live."""
