"""The Bedrock face: what boto3 and the AWS CLI call ``bedrock`` and ``bedrock-runtime``.

    operations     the route table, read from botocore's own service models
    constraints    values against the shapes of those models
    messages       requests become members by name, members become answers
    face           the routes of the server; faults as AWS writes them
    control        what every operation of the control plane works with
    identifiers    ARNs, names and ids to what they name
    lists          pages whose tokens are positions

The operations of the control plane stand beside them, a file for each kind of resource; those of the
runtime are in ``luthier.api.bedrock.runtime``.
"""
