"""Attention kernels over paged keys and values. A backend never sees a rank: what it attends to is in its rows."""
