"""Execution of networks on token trees: attention, layouts, heads, faster modules and their probe."""
