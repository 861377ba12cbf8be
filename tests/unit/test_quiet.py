"""Of other libraries' warnings the first rank's are heard, and errors of all."""

import io
import logging
import warnings

import pytest

from cpinfer_tools.quiet import quiet_others

CPU = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


def heard(rank):
    stream = io.StringIO()
    logger, handler = logging.getLogger("DeepSpeed"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        with quiet_others(rank):
            logger.warning(CPU)
            logger.warning("loss scale is low")
            logger.error("it broke")
    finally:
        logger.removeHandler(handler)
    return stream.getvalue().splitlines()


def test_the_first_rank_is_heard_without_noise_and_the_others_with_errors_alone():
    assert heard(0) == ["loss scale is low", "it broke"]
    assert heard(1) == ["it broke"]


@pytest.mark.parametrize("rank, modules", [(0, ["accelerate.state", "cpinfer.engine"]), (1, ["cpinfer.engine"])])
def test_warnings_of_libraries_come_from_the_first_rank_and_ours_from_all(rank, modules):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_others(rank):
            for module in ("accelerate.state", "cpinfer.engine"):
                warnings.warn_explicit(module, UserWarning, "f.py", 1, module=module)
                warnings.warn_explicit(
                    f"OMP_NUM_THREADS/MKL_NUM_THREADS unset, {module}", UserWarning, "f.py", 1, module
                )
    assert [str(found.message) for found in caught] == modules


def test_afterwards_everybody_is_heard_again():
    with pytest.raises(ZeroDivisionError), quiet_others(1):
        raise ZeroDivisionError
    assert logging.getLogger("DeepSpeed").filters == []
