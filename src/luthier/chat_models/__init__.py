"""Models that are asked for texts: who they are, how they are asked, and what comes back."""
