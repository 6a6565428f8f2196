"""The Bedrock API: the operations that boto3 and the AWS CLI call on ``bedrock`` and
``bedrock-runtime``.

    shapes         operations and shapes of botocore's service models: validation and rendering
    routes         routes of the API, and errors in AWS's form
    control        shared parts of control plane operations, such as pagination
    runtime        Converse, InvokeModel, the streams of both, and CountTokens

Each kind of resource of the control plane has a module with its operations.
"""
