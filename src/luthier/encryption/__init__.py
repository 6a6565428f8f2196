"""Encryption at rest: AES-256-GCM over what a store keeps of its users' data and weights.

keys      the keys of a store, wrapped under one that is kept elsewhere
chunks    the form of an encrypted file: written as a stream, read from any place
files     files and lines that are encrypted where the store is
memory    where plain copies live while somebody works on them: in memory, never on a disk
"""
