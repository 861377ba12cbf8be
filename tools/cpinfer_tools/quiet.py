"""What other libraries say that tells a user nothing, left out: on ranks behind the first all that is no error.

Set by tools in their own processes, for as long as they run, and never by the library.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

OTHERS = ("DeepSpeed", "accelerate", "datasets", "deepspeed", "peft", "torch", "transformers", "trl")
# Said by the first rank too, of what is as it was asked for: which device we run on, the line about loading says.
NOISE = ("Setting accelerator to CPU", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")
# Warnings are told apart by the module that they blame.
_MODULES = rf"({'|'.join(OTHERS)})(\.|$)"


@contextmanager
def quiet_others(rank: int) -> Iterator[None]:
    """Inside the block the libraries' warnings come from the first rank alone, without what is noise there as well."""

    def says_something(record: logging.LogRecord) -> bool:
        if rank and record.levelno < logging.ERROR:
            return False
        return not record.getMessage().startswith(NOISE)

    loggers = [logging.getLogger(name) for name in OTHERS]
    with warnings.catch_warnings():
        for text in NOISE:
            warnings.filterwarnings("ignore", message=text)
        if rank:
            warnings.filterwarnings("ignore", module=_MODULES)
        for logger in loggers:
            logger.addFilter(says_something)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(says_something)
