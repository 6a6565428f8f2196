"""Commands of operators: the service, its accounts, keys, jobs and models."""
