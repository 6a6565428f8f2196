"""What this machine keeps: base models, custom models and their lineage."""
