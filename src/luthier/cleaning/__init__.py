"""Cleaning: chosen fixes applied to a data set, written as a new one with a log of every change."""
