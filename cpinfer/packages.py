"""Packages that only some of what is here needs: they are extras, and a missing one is named with how to get it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from cpinfer.errors import UserError

# By the name that they are imported by; the extra of cpinfer that brings each.
EXTRAS: Mapping[str, str] = {
    "accelerate": "accelerate",
    "deepspeed": "deepspeed",
    "lm_eval": "eval",
    "matplotlib": "eval",
    "peft": "rl",
    "prometheus_client": "serve",
    "psutil": "eval",
    "pydantic": "serve",
    "starlette": "serve",
    "trl": "rl",
    "uvicorn": "serve",
    "wandb": "wandb",
}


def missing_package(module: str, who: str, extra: str | None = None) -> UserError | None:
    """What to say of a `module` that could not be imported, and that `who` needs; None where no extra brings it.

    `extra`: that of who needs it, where several bring it.

    >>> print(missing_package("trl.trainer", "cpinfer train-grpo"))
    cpinfer train-grpo needs the package trl, which is not installed. Run `pip install "cpinfer[rl]"`.
    """
    package = module.partition(".")[0]
    if package not in EXTRAS:
        return None
    line = f'pip install "cpinfer[{extra or EXTRAS[package]}]"'
    return UserError(f"{who} needs the package {package}, which is not installed. Run `{line}`.")


def named(error: ModuleNotFoundError, who: str) -> ModuleNotFoundError:
    """The same error, with how to get what is missing where one of our extras brings it."""
    missing = missing_package(error.name or "", who)
    return error if missing is None else ModuleNotFoundError(str(missing), name=error.name)


def need_package(package: str, who: str) -> None:
    """UserError when `package`, one of `EXTRAS`, is not installed. Nothing is imported."""
    if find_spec(package) is None:
        error = missing_package(package, who)
        assert error is not None, f"{package} is no extra"
        raise error
