"""Reinforcement learning with graded rewards, one file per objective."""
