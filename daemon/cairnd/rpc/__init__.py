"""The daemon's face: translation between the wire and the daemon's own calls. The only package that imports grpc."""
