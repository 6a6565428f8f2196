"""Checks of images, audio and time series."""
