"""Preferences between answers, one file per objective."""
