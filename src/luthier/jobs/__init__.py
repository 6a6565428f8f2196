"""Customization jobs: how they are submitted, scheduled and carried out.

submit      a request of any face becomes a row of the queue
scheduler   starts a worker process for each job that fits, and notices those that die
worker      the process that trains one job
"""
