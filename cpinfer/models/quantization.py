"""Quantized checkpoints, read as the plain tensors that they stand for: fp8 (DeepSeek, Qwen) and mxfp4 (gpt-oss).

    fp8     W            [R, C] float8         W[r, c] * scale[r // M, c // N]; blocks of M x N as config.json has them,
            W_scale_inv  [R / M, C / N]        the last of a row or column cut; without blocks one scale for all
    mxfp4   W_blocks     [E, R, G, 16] uint8   two numbers in a byte, the lower half first: W[e, 32 g + i, r] is
            W_scales     [E, R, G] uint8       number i of block g times 2 ** (scale - 127)

Transformers' own dequantizing takes the size of blocks from the number of scales, which fits where no block is cut:
weights of 40 rows in blocks of 32 would come out wrong, and DeepSeek-V3's kv_a_proj_with_mqa (576 rows, blocks of 128)
not at all. So tensors are dequantized here, one by one as Transformers' loader asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from cpinfer.errors import UserError
from cpinfer.models.checkpoint import Checkpoint, StoredTensor
from cpinfer.models.config_values import wrong_value
from cpinfer.models.stored_tensors import Readable
from cpinfer.refusals import refuse

# What a config.json may call it, now and before.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
_PLAIN = "BF16"  # what is dequantized counts as; it is loaded in the dtype that the run has


class Quantization(Protocol):
    """How a checkpoint's weights are quantized."""

    @property
    def suffixes(self) -> tuple[str, str]:
        """What the names of a weight's codes and of its scales end in, beside the weight's own name."""
        ...

    def shape(self, codes: StoredTensor, scales: StoredTensor) -> tuple[int, ...] | str:
        """Of the weight; or what was wanted of codes and scales that do not fit together."""
        ...

    def dequantized(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight."""
        ...


@dataclass(frozen=True)
class Float8:
    """`block` is rows and columns of a weight that share a scale, None where all of it do."""

    block: tuple[int, int] | None
    suffixes: ClassVar[tuple[str, str]] = ("", "_scale_inv")

    def shape(self, codes: StoredTensor, scales: StoredTensor) -> tuple[int, ...] | str:
        """See `Quantization`."""
        if self.block is None:
            return codes.shape if scales.shape in ((), (1,)) else "one scale for all"
        wanted = [*codes.shape[:-2], *(-(-n // size) for n, size in zip(codes.shape[-2:], self.block, strict=True))]
        return codes.shape if list(scales.shape) == wanted else f"scales {wanted}"

    def dequantized(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Quantization`."""
        # Bytes are exponents, as in the dtype for these.
        factors = torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()
        if self.block is not None:
            for dim, (num, size) in enumerate(zip(codes.shape[-2:], self.block, strict=True), start=-2):
                factors = factors.repeat_interleave(size, dim).narrow(dim, 0, num)
        return (codes.float() * factors).to(dtype)


@dataclass(frozen=True)
class Mxfp4:
    """Four bits for a number, and an exponent for 32 of them."""

    suffixes: ClassVar[tuple[str, str]] = ("_blocks", "_scales")

    def shape(self, codes: StoredTensor, scales: StoredTensor) -> tuple[int, ...] | str:
        """See `Quantization`."""
        if len(codes.shape) != 4 or codes.shape[-1] != 16:
            return "blocks [experts, rows, groups, 16]"
        num_experts, num_rows, num_groups, _ = codes.shape
        wanted = (num_experts, num_rows, num_groups)
        return (num_experts, 32 * num_groups, num_rows) if scales.shape == wanted else f"scales {list(wanted)}"

    def dequantized(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Quantization`. Expert by expert: on the way a weight takes up several times its size."""
        pairs = torch.tensor([[_FP4[byte & 15], _FP4[byte >> 4]] for byte in range(256)])
        num_experts, num_rows, num_groups, _ = codes.shape
        weight = torch.empty(num_experts, 32 * num_groups, num_rows, dtype=dtype)
        for expert, (blocks, exponents) in enumerate(zip(codes, scales, strict=True)):
            numbers = torch.ldexp(pairs[blocks.int()], (exponents.int() - 127)[..., None, None])
            weight[expert] = numbers.reshape(num_rows, -1).T
        return weight


def quantization(config: Mapping[str, Any]) -> Quantization | None:
    """How the weights of a config's checkpoint are quantized, None where they are not.

    UnsupportedError for another method than those above, UserError for a value that no config has.
    """
    name = next((key for key in QUANTIZATION_KEYS if config.get(key) is not None), None)
    if name is None:
        return None
    values = config[name]
    if not isinstance(values, Mapping) or not isinstance(values.get("quant_method"), str):
        raise wrong_value(config, name, 'an object with a "quant_method"')
    method, block = values["quant_method"], values.get("weight_block_size")
    if method == "mxfp4":
        return Mxfp4()
    if method != "fp8":
        raise refuse("quantized_checkpoint", f'"{name}" with quant_method "{method}"')
    if block is None:
        return Float8(None)
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise wrong_value(values, "weight_block_size", "rows and columns, as [128, 128], or null")
    return Float8((block[0], block[1]))


def as_plain(checkpoint: Checkpoint, how: Quantization) -> Checkpoint:
    """The checkpoint as its headers would be without quantization. UserError for a weight that lacks its scales."""
    tensors = dict(checkpoint.tensors)
    for name, codes, scales in _quantized(checkpoint, how):
        shape = how.shape(tensors.pop(codes), tensors.pop(scales))
        if isinstance(shape, str):
            found = " and ".join(f"{x} {list(checkpoint.tensors[x].shape)}" for x in (codes, scales))
            raise UserError(f"model {checkpoint.folder}: its files have {found}; {shape} were wanted. They are broken.")
        tensors[name] = StoredTensor(_PLAIN, shape)
    # Scales of activations, which are not quantized here.
    return replace(checkpoint, tensors={k: v for k, v in tensors.items() if not k.endswith(".activation_scale")})


def plain_tensors(
    checkpoint: Checkpoint, how: Quantization, dtype: torch.dtype, stored: Mapping[str, Readable]
) -> dict[str, Readable]:
    """Tensor by name, of those `stored` in the files: none is read, or dequantized, before it is asked for."""
    tensors = dict(stored)
    plain = as_plain(checkpoint, how).tensors
    for name, codes, scales in _quantized(checkpoint, how):
        tensors[name] = _Dequantized(how, tensors.pop(codes), tensors.pop(scales), plain[name].shape, dtype)
    return {name: tensors[name] for name in plain}


def _quantized(checkpoint: Checkpoint, how: Quantization) -> Iterator[tuple[str, str, str]]:
    """Of every quantized weight its name and those of codes and scales. UserError where one is without the other."""
    of_codes, of_scales = how.suffixes
    for codes, tensor in checkpoint.tensors.items():
        is_codes = tensor.dtype.startswith("F8_E") if not of_codes else codes.endswith(of_codes)
        if not is_codes or codes.endswith(of_scales):
            continue
        name = codes.removesuffix(of_codes)
        scales = checkpoint.tensors.get(name + of_scales)
        if scales is None or scales.dtype not in _SCALE_DTYPES:
            raise UserError(
                f"model {checkpoint.folder}: {codes} is quantized ({tensor.dtype}), and its scales, {name}{of_scales}, "
                "are in none of its files. They are incomplete, or quantized otherwise than its config.json says."
            )
        yield name, codes, name + of_scales


@dataclass(frozen=True)
class _Dequantized:
    """A tensor that is not there yet: a `Readable`."""

    how: Quantization
    codes: Readable
    scales: Readable
    shape: tuple[int, ...]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """See `Readable`."""
        return list(self.shape)

    def __getitem__(self, index: Any) -> Tensor:
        """See `Readable`."""
        return self.how.dequantized(self.codes[...], self.scales[...], self.dtype)[index]

    def copied(self, index: Any) -> Tensor:
        """See `Readable`."""
        return self[index].clone(memory_format=torch.contiguous_format)
