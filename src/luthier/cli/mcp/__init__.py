"""``luthier mcp``: tools for agents that speak the Model Context Protocol."""
