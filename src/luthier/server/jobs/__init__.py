"""Leased work of the service: customization jobs, imports and exports.

submit      puts a request of any API into the queue
kinds       the table of the kinds of work
scheduler   starts a worker process for each work that fits, and detects dead workers
worker      the process of one work; ``training``, ``import_worker`` and ``export_worker`` do the work
"""
