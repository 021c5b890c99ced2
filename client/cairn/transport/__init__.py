"""The client's way to its daemon: two sockets, one token, shared memory or a byte stream.

``connection`` is one live connection, ``link`` its replacement when the daemon restarts, ``calls`` what can be asked,
``keepalive`` the thread that keeps both alive; ``shared_memory`` and ``pool`` hold the capture buffers and ``stream``
carries the same bytes where memory cannot be shared.
"""
