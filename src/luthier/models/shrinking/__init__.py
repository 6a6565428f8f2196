"""Smaller networks made of a larger network's weights: students and pruning."""
