"""Files that outlast a crash (atomic, locked, checked, resumable), and those that users bring (JSON, its records).

May import no other room.
"""
