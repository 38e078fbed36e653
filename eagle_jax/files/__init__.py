"""Files that outlast a crash (atomic, locked, checked, resumable), and those that users bring (JSON, its records).

Imports no other room.
"""
