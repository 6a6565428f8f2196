"""The server: the Bedrock, OpenAI, S3, STS and native APIs on one port."""
