"""What `cairn doctor` looks at: one module per subject, each a generator of findings.

Nothing durable is changed: probes are unnamed files, or objects that are removed again. Checks run at the same time, in
threads of their own, and what has not answered by the deadline is itself a finding.
"""
