"""Estimates of the time, memory, disk space and cost of a job."""
