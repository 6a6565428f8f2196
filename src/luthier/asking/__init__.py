"""Asking models for texts: who is asked, how, and what comes back."""
