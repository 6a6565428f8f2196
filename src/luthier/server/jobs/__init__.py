"""Leased work of the service: customization jobs, and imports of models from outside.

submit      a request of any face becomes a row of the queue
kinds       the kinds of work that there are
scheduler   starts a worker process for what fits, and notices those that die
worker      the process that does one piece of work; ``training`` and ``import_worker`` say what
"""
