"""Files to records and back: containers, tables, nested documents, sources and S3."""
