"""Services on the tables: the object store, uploaded files, backup, removal and first principals."""
