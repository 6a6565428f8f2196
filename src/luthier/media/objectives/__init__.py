"""Objectives that generate images, or text from images."""
