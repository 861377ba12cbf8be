"""What TRL's AsyncGRPO imports of vLLM, for machines that have none: that it is there, and how weights would be sent.

Nothing of vLLM runs in that trainer but its side of the NCCL transfer. Here that side opens no group and sends 0 bytes,
as is right for a server that shares the trainer's weights; it counts what it was asked for.
"""

__version__ = "0.22.0"
