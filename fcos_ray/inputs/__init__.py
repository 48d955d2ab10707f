"""Manifest to pinned shards, uri to bytes, bytes to pixels. Knows no model and no Ray."""
