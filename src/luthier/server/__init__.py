"""The service: one port for the Bedrock, OpenAI, S3 and native faces."""
