"""Attention on one device, over paged keys and values: `base` is the contract, each backend a file or a folder.

A backend never sees a rank: what it attends to is in its rows.
"""
