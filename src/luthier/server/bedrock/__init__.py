"""The Bedrock face: what boto3 and the AWS CLI call ``bedrock`` and ``bedrock-runtime``.

    shapes         operations and shapes of botocore's service models; members of requests, answers
    face           the routes of the server; faults as AWS writes them
    control        what every operation of the control plane works with, pages of lists among it

The operations of the control plane stand beside them, a file for each kind of resource; those of the
runtime are in ``luthier.server.bedrock.runtime``.
"""
