"""The verbs, one module each: ``NAME``, ``HELP``, ``configure(parser)`` and ``run(invocation) -> exit status``.

A module's docstring is the text of ``cairn VERB --help`` and documents the verb's JSON.
"""
