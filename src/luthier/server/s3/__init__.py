"""The S3-compatible API: path-style access to the built-in object store."""
