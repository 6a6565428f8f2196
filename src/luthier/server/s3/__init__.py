"""The S3-compatible face: path-style access to the built-in object store."""
