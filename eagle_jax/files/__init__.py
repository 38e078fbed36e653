"""Files that outlast a crash: atomic writes, checksums, locks, resumable lines, and reading JSON with faults by place.

Imports no other room.
"""
