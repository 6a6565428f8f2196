"""Models on this machine: base models, custom models and their lineage."""
