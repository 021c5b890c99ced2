"""From a state dict to a plain ``torch.save`` file in shared memory: plan the bytes, then copy each once.

``plan.plan(state)`` is the way in. ``pickling`` writes the pickle and finds the storages, ``zip_layout`` computes where
every byte of the archive goes, ``copying`` moves the tensor bytes without the interpreter lock, ``globals`` holds the
policy for reading such a file back, and ``pinning`` registers capture buffers with CUDA.
"""
