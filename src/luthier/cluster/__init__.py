"""Work on clusters: launch files, and processes on the nodes of a Ray cluster.

The server finds the job runner ``ray`` by an entry point, like the runners of plugins.
"""
