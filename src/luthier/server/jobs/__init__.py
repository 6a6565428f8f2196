"""Leased work of the service: customization jobs, imports, exports and measurements.

submit      puts a request of any API into the queue
kinds       the table of the kinds of work
scheduler   starts a worker process for each work that fits, and detects dead workers
worker      the process of one work; ``training`` and the modules ``…_worker`` do the work
"""
