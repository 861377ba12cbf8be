// A module of PTX as it is run: kernels as lists of instructions over numbered registers.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "types.h"

namespace ptx {

enum class Space : uint8_t { generic, global, shared, local, param, constant };

enum class Op : uint8_t {
  none, mov, load, store, cvta, cvt, add, sub, mul, mad, fma, div, rem, min, max, neg, abs, not_, and_, or_, xor_, shl,
  shr, setp, set, selp, bfe, bfi, prmt, lop3, shf, clz, popc, brev, bra, brx, exit, bar, bar_warp, cp_async, ldmatrix,
  stmatrix, mma, shfl, vote, redux, activemask, atom, ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh, copysign, trap, call,
  clock
};

enum class Compare : uint8_t { eq, ne, lt, le, gt, ge, ltu, leu, gtu, geu, equ, neu, num, nan };
enum class Round : uint8_t { nearest, zero, down, up };
enum class Special : uint8_t {
  tid_x, tid_y, tid_z, ntid_x, ntid_y, ntid_z, ctaid_x, ctaid_y, ctaid_z, nctaid_x, nctaid_y, nctaid_z, laneid, warpid,
  lanemask_lt, lanemask_le, lanemask_eq, lanemask_gt, lanemask_ge, envreg1, envreg2, dynamic_smem_size,
  total_smem_size, extern_shared, smid, nsmid
};

// An address: a register (-1: none) and a constant.
struct Address {
  int base = -1;
  i64 offset = 0;
};

struct Instruction {
  Op op = Op::none;
  Type type = Type::none, from = Type::none;  // `from`: the second type where there are two, else the same
  Space space = Space::generic;
  uint8_t mode = 0;      // what the operation makes of it: a comparison, hi and lo, the kind of a shuffle, ...
  uint8_t combine = 0;   // setp: 0, or its result with the predicate by 1 and, 2 or, 3 xor
  Round round = Round::nearest;
  bool to_integral = false;  // rni, rzi, rmi, rpi: rounded to a whole number
  bool flushes = false, saturates = false, transposes = false, keeps_nan = false, to_space = false;
  int guard = -1;
  bool guard_is_negated = false;
  std::vector<int> d, s;         // registers written and read; -1 for `_`
  std::vector<uint8_t> negated;  // of each read one, whether it is a predicate read as its contrary
  Address address, source;
  std::vector<int> targets;      // of branches: where they go
  std::string text;
};

struct Parameter {
  std::string name;
  u32 offset, bytes;
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  std::vector<uint8_t> arguments;  // of the launch that runs; addresses in the code point here
  std::vector<uint8_t> call_room;  // of parameters of calls
  std::vector<Instruction> code;
  int num_registers = 0;
  std::vector<std::pair<int, u64>> constants;
  std::vector<std::pair<int, Special>> specials;
  u32 static_shared_bytes = 0, local_bytes = 0;
  bool is_parsed = false;
  size_t body_begin = 0, body_end = 0;  // in the text of its module, without the braces
};

// Memory of a variable of the module; its place in shared memory is each kernel's own.
struct Variable {
  bool is_shared = false, is_external = false;
  std::vector<uint8_t> room;
};

struct Module {
  std::string text;
  std::map<std::string, Variable> variables;
  std::map<std::string, Kernel> kernels;
};

// Throws std::runtime_error for what is not known. Bodies of kernels are read when they are first launched.
std::unique_ptr<Module> parse_module(const std::string& text);
void parse_kernel(Module& module, Kernel& kernel);

}  // namespace ptx
