"""The sandbox for untrusted code: launcher, outer processes (child), and inner process (harness)."""
