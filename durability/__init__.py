"""Fault injection: kills, power cuts, full disks, races and flipped bits, at every system call.

``python -m durability`` (``make durability``) runs all of it against the tool as it is installed.
It needs Linux, root, strace, e2fsprogs and xfsprogs; what is refused is a failure, never skipped.
"""
