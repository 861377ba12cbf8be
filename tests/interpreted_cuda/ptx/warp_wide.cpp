// What the lanes of a warp do together: matrices, shuffles, votes, reductions.
#include "machine.h"

namespace ptx {

// The lanes that an instruction waits for: it says so itself, or it is of the whole warp.
u32 Machine::expected_lanes(Warp& warp, const Instruction& in, u32 mask) const {
  const int first = __builtin_ctz(mask);
  switch (in.op) {
    case Op::shfl: return u32(warp.reg(in.s[3])[first]);
    case Op::vote: case Op::redux: return u32(warp.reg(in.s[1])[first]);
    case Op::bar_warp: return u32(warp.reg(in.s[0])[first]);
    default: return ALL_LANES;
  }
}

void Machine::together(Warp& warp, const Instruction& in, u32 mask) {
  bool is_of_all = in.op == Op::mma || in.op == Op::ldmatrix || in.op == Op::stmatrix;
  if (is_of_all && mask != ALL_LANES) fault(warp, in, __builtin_ctz(mask), "not all lanes of the warp are there");
  switch (in.op) {
    case Op::mma: return matrix_product(warp, in);
    case Op::ldmatrix: return load_matrices(warp, in);
    case Op::stmatrix: return store_matrices(warp, in);
    case Op::shfl: return shuffle(warp, in, mask);
    case Op::vote: return vote(warp, in, mask);
    case Op::redux: return reduce(warp, in, mask);
    default: return;  // bar.warp: they have met
  }
}

// C[16, 8] += A[16, k] B[k, 8]. With g = lane / 4 and t = lane % 4, registers hold pairs of neighbours in k:
//
//     A   row g or g + 8 (of the odd registers), columns 2t, 2t + 1, from the third register on 8 further
//     B   column g, rows 2t, 2t + 1, of the second register 8 further
//     C   row g or g + 8 (of the second half), columns 2t, 2t + 1
//
// Sums are in float32, in order of k, which a card does not promise.
void Machine::matrix_product(Warp& warp, const Instruction& in) {
  const int k = in.mode, num_a = k / 4, num_b = k / 8;
  const bool sums_in_half = in.type == Type::f16;
  const int num_c = sums_in_half ? 2 : 4;
  if (int(in.d.size()) != num_c || int(in.s.size()) != num_a + num_b + num_c)
    fault(warp, in, 0, "another number of registers than its shape has");
  float a[16][16], b[16][8], c[16][8];
  auto low = [&](u64 v) { return float(widen(in.from, uint16_t(v))); };
  for (int lane = 0; lane < LANES; lane++) {
    const int g = lane >> 2, t = 2 * (lane & 3);
    for (int r = 0; r < num_a; r++) {
      u64 v = warp.reg(in.s[r])[lane];
      float* at = &a[g + (r & 1) * 8][t + (r >> 1) * 8];
      at[0] = low(v), at[1] = low(v >> 16);
    }
    for (int r = 0; r < num_b; r++) {
      u64 v = warp.reg(in.s[num_a + r])[lane];
      b[t + r * 8][g] = low(v), b[t + 1 + r * 8][g] = low(v >> 16);
    }
    for (int r = 0; r < num_c; r++) {
      u64 v = warp.reg(in.s[num_a + num_b + r])[lane];
      if (sums_in_half) c[g + r * 8][t] = float(half_to_double(uint16_t(v))), c[g + r * 8][t + 1] = float(half_to_double(uint16_t(v >> 16)));
      else c[g + (r >> 1) * 8][t + (r & 1)] = bits<float>(v);
    }
  }
  for (int i = 0; i < 16; i++)
    for (int n = 0; n < k; n++)
      for (int j = 0; j < 8; j++) c[i][j] += a[i][n] * b[n][j];
  for (int lane = 0; lane < LANES; lane++) {
    const int g = lane >> 2, t = 2 * (lane & 3);
    for (int r = 0; r < num_c; r++) {
      if (in.d[r] < 0) continue;
      u64& d = warp.reg(in.d[r])[lane];
      if (sums_in_half) d = u64(narrow(Type::f16, c[g + r * 8][t])) | u64(narrow(Type::f16, c[g + r * 8][t + 1])) << 16;
      else d = raw(c[g + (r >> 1) * 8][t + (r & 1)]);
    }
  }
}

// Matrices of 8 rows of 8 halves. Lane 8j + i has the address of row i of matrix j; of it, lane l is given the
// neighbours 2(l % 4), 2(l % 4) + 1 of row l / 4, or of column l / 4 under .trans.
void Machine::load_matrices(Warp& warp, const Instruction& in) {
  const int count = int(in.d.size());
  const uint8_t* rows[LANES];
  for (int l = 0; l < 8 * count; l++) rows[l] = place(warp, in, in.address, Space::shared, l, 16, "read");
  for (int j = 0; j < count; j++) {
    if (in.d[j] < 0) continue;
    u64* d = warp.reg(in.d[j]);
    for (int l = 0; l < LANES; l++) {
      const int line = l / 4, first = 2 * (l % 4);
      auto element = [&](int row, int column) {
        uint16_t v;
        memcpy(&v, rows[8 * j + row] + 2 * column, 2);
        return u64(v);
      };
      d[l] = in.transposes ? element(first, line) | element(first + 1, line) << 16
                           : element(line, first) | element(line, first + 1) << 16;
    }
  }
}

void Machine::store_matrices(Warp& warp, const Instruction& in) {
  const int count = int(in.s.size());
  uint8_t* rows[LANES];
  for (int l = 0; l < 8 * count; l++) rows[l] = place(warp, in, in.address, Space::shared, l, 16, "write");
  for (int j = 0; j < count; j++) {
    const u64* s = warp.reg(in.s[j]);
    for (int l = 0; l < LANES; l++) {
      const int line = l / 4, first = 2 * (l % 4);
      for (int i = 0; i < 2; i++) {
        uint16_t v = uint16_t(s[l] >> (16 * i));
        if (in.transposes) memcpy(rows[8 * j + first + i] + 2 * line, &v, 2);
        else memcpy(rows[8 * j + line] + 2 * (first + i), &v, 2);
      }
    }
  }
}

// The third operand has the clamp in bits 0 to 4, and in 8 to 12 the bits that all lanes of a segment share.
void Machine::shuffle(Warp& warp, const Instruction& in, u32 mask) {
  enum { up, down, butterfly, index };
  const u64 *a = warp.reg(in.s[0]), *b = warp.reg(in.s[1]), *c = warp.reg(in.s[2]);
  u64 out[LANES] = {};
  bool is_within[LANES] = {};
  each_lane(mask, [&](int l) {
    const int by = int(b[l] & 31), clamp = int(c[l] & 31), segment = int(c[l] >> 8 & 31);
    const int least = l & segment, end = least | (clamp & ~segment);
    int from = in.mode == up ? l - by : in.mode == down ? l + by : in.mode == butterfly ? l ^ by : least | (by & ~segment);
    is_within[l] = in.mode == up ? from >= end : from <= end;
    if (!is_within[l]) from = l;
    if (!has(mask, from)) fault(warp, in, l, "a shuffle from lane " + std::to_string(from) + ", which is not there");
    out[l] = a[from];
  });
  u64 *d = in.d[0] >= 0 ? warp.reg(in.d[0]) : nullptr;
  u64 *p = in.d.size() > 1 && in.d[1] >= 0 ? warp.reg(in.d[1]) : nullptr;
  each_lane(mask, [&](int l) {
    if (d) d[l] = out[l];
    if (p) p[l] = is_within[l];
  });
}

void Machine::vote(Warp& warp, const Instruction& in, u32 mask) {
  enum { all, any, uniform, ballot };
  const u64* a = warp.reg(in.s[0]);
  u32 yes = 0;
  each_lane(mask, [&](int l) { yes |= u32((a[l] & 1) != in.negated[0]) << l; });
  u64 result = in.mode == all ? yes == mask : in.mode == any ? yes != 0 : in.mode == uniform ? yes == mask || !yes : yes;
  u64* d = warp.reg(in.d[0]);
  each_lane(mask, [&](int l) { d[l] = result; });
}

void Machine::reduce(Warp& warp, const Instruction& in, u32 mask) {
  enum { add, min, max, and_, or_, xor_ };
  const u64* a = warp.reg(in.s[0]);
  u64 result = integer(in.type, a[__builtin_ctz(mask)]);
  each_lane(mask & (mask - 1), [&](int l) {
    u64 v = integer(in.type, a[l]);
    bool is_less = is_signed(in.type) ? i64(v) < i64(result) : v < result;
    switch (in.mode) {
      case add: result += v; break;
      case min: result = is_less ? v : result; break;
      case max: result = is_less ? result : v; break;
      case and_: result &= v; break;
      case or_: result |= v; break;
      default: result ^= v;
    }
  });
  u64* d = warp.reg(in.d[0]);
  each_lane(mask, [&](int l) { d[l] = result; });
}

}  // namespace ptx
