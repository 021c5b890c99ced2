"""What client and daemon share: names, errors, and (in ``v1``) the generated wire types.

Only the standard library is imported here and in the modules beside this one; ``v1`` adds protobuf and grpc.
"""
