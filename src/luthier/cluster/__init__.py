"""Work on clusters: launch files, and processes on the nodes of a Ray cluster.

The server finds the job runner ``ray`` by an entry point, as it finds the runners of plugins.
"""
