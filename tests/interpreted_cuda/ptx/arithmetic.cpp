// Arithmetic, comparisons and bits of registers, lane by lane.
//
// Functions that a card approximates (division, ex2, lg2, ...) are computed as exactly as the host can.
#include <climits>

#include "machine.h"

namespace ptx {

namespace {

using u128 = unsigned __int128;
using i128 = __int128;

// d = f(a), f(a, b) or f(a, b, c), as many as f takes; operands and results are the bits of a T.
template <class T, class F> void map(Warp& warp, const Instruction& in, u32 mask, F f) {
  u64* d = warp.reg(in.d[0]);
  const u64* a = warp.reg(in.s[0]);
  if constexpr (std::is_invocable_v<F, T>) {
    each_lane(mask, [&](int l) { d[l] = raw(T(f(bits<T>(a[l])))); });
  } else {
    const u64* b = warp.reg(in.s[1]);
    if constexpr (std::is_invocable_v<F, T, T>) {
      each_lane(mask, [&](int l) { d[l] = raw(T(f(bits<T>(a[l]), bits<T>(b[l])))); });
    } else {
      const u64* c = warp.reg(in.s[2]);
      each_lane(mask, [&](int l) { d[l] = raw(T(f(bits<T>(a[l]), bits<T>(b[l]), bits<T>(c[l])))); });
    }
  }
}

// `f` over whole numbers of the type; its argument is one of that type.
template <class F> void of_whole(Type type, F f) {
  switch (type) {
    case Type::b16: case Type::u16: return f(uint16_t{});
    case Type::s16: return f(int16_t{});
    case Type::b32: case Type::u32: return f(uint32_t{});
    case Type::s32: return f(int32_t{});
    case Type::s64: return f(int64_t{});
    default: return f(uint64_t{});
  }
}
template <class F> void map_whole(Warp& warp, const Instruction& in, u32 mask, F f) {
  of_whole(in.type, [&](auto of) { map<decltype(of)>(warp, in, mask, f); });
}

double flushed_half(Type type, double v) {
  double least = is_half(type) ? 0x1p-14 : 0x1p-126;
  return std::fabs(v) < least ? std::copysign(0., v) : v;
}

// `f` in double, of one half or of both of a pair.
template <class F> void map_halves(Warp& warp, const Instruction& in, u32 mask, F f) {
  auto in_of = [&](u64 v) {
    double wide = widen(in.type, uint16_t(v));
    return in.flushes ? flushed_half(in.type, wide) : wide;
  };
  auto half = [&](auto... x) {
    double r = f(in_of(x)...);
    return u64(narrow(in.type, in.flushes ? flushed_half(in.type, r) : r));
  };
  auto pair = [&](auto... x) { return half(x...) | half(x >> 16 ...) << 16; };
  auto one = [&](auto... x) { return is_packed(in.type) ? pair(x...) : half(x...); };
  if constexpr (std::is_invocable_v<F, double>) map<u64>(warp, in, mask, [&](u64 a) { return one(a); });
  else if constexpr (std::is_invocable_v<F, double, double>)
    map<u64>(warp, in, mask, [&](u64 a, u64 b) { return one(a, b); });
  else map<u64>(warp, in, mask, [&](u64 a, u64 b, u64 c) { return one(a, b, c); });
}

template <class F> void map_floats(Warp& warp, const Instruction& in, u32 mask, F f) {
  if (in.type == Type::f64) return map<double>(warp, in, mask, f);
  if (in.type != Type::f32) return map_halves(warp, in, mask, f);
  if (!in.flushes && !in.saturates) return map<float>(warp, in, mask, f);
  auto clean = [&](float x) { return in.flushes ? flush(x) : x; };
  auto end = [&](float r) {
    r = clean(r);
    return !in.saturates ? r : r != r ? 0.f : std::min(1.f, std::max(0.f, r));
  };
  if constexpr (std::is_invocable_v<F, float>)
    map<float>(warp, in, mask, [&](float a) { return end(f(clean(a))); });
  else if constexpr (std::is_invocable_v<F, float, float>)
    map<float>(warp, in, mask, [&](float a, float b) { return end(f(clean(a), clean(b))); });
  else map<float>(warp, in, mask, [&](float a, float b, float c) { return end(f(clean(a), clean(b), clean(c))); });
}

// --- whole numbers

template <class T> T high_product(T a, T b) {
  if constexpr (sizeof(T) == 8) {
    using Wide = std::conditional_t<std::is_signed_v<T>, i128, u128>;
    return T(Wide(a) * Wide(b) >> 64);
  } else {
    return T((i64(a) * i64(b)) >> (8 * sizeof(T)));
  }
}

void multiply(Warp& warp, const Instruction& in, u32 mask) {
  const bool adds = in.op == Op::mad;
  u64 *d = warp.reg(in.d[0]), *a = warp.reg(in.s[0]), *b = warp.reg(in.s[1]), *c = adds ? warp.reg(in.s[2]) : nullptr;
  if (in.mode == 0) {
    each_lane(mask, [&](int l) { d[l] = a[l] * b[l] + (adds ? c[l] : 0); });
  } else if (in.mode == 2) {
    each_lane(mask, [&](int l) { d[l] = integer(in.type, a[l]) * integer(in.type, b[l]) + (adds ? c[l] : 0); });
  } else {
    of_whole(in.type, [&](auto of) {
      using T = decltype(of);
      each_lane(mask, [&](int l) { d[l] = u64(high_product(bits<T>(a[l]), bits<T>(b[l]))) + (adds ? c[l] : 0); });
    });
  }
}

template <class T> T quotient(T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return T(u64(0) - u64(a));
  return T(a / b);
}
template <class T> T remainder_of(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return T(a % b);
}

void shift(Warp& warp, const Instruction& in, u32 mask) {
  const u32 width = u32(8 * bytes_of(in.type));
  u64 *d = warp.reg(in.d[0]), *a = warp.reg(in.s[0]), *b = warp.reg(in.s[1]);
  each_lane(mask, [&](int l) {
    u32 by = u32(b[l]);
    u64 v = integer(in.type, a[l]);
    if (in.op == Op::shl) d[l] = by >= width ? 0 : v << by;
    else if (is_signed(in.type)) d[l] = u64(i64(v) >> std::min(by, width - 1));
    else d[l] = by >= width ? 0 : v >> by;
  });
}

// Bits [position, position + length) of a; beyond its end they are its sign, or zeros.
u64 extracted(Type type, u64 a, u64 position, u64 length) {
  const int width = 8 * bytes_of(type), first = int(position & 255), count = int(length & 255);
  if (count == 0) return 0;
  u64 v = integer(type, a);
  u64 from = is_signed(type) ? u64(i64(v) >> std::min(first, 63)) : first >= width ? 0 : v >> first;
  if (!is_signed(type)) return count >= 64 ? from : from & ((u64(1) << count) - 1);
  int kept = std::min(count, width - std::min(first, width - 1));
  return u64(i64(from << (64 - kept)) >> (64 - kept));
}

u64 inserted(u64 a, u64 b, u64 position, u64 length) {
  const int first = int(position & 255), count = int(length & 255);
  if (first >= 64 || count == 0) return b;
  u64 ones = (count >= 64 ? ~u64(0) : (u64(1) << count) - 1) << first;
  return (b & ~ones) | ((a << first) & ones);
}

u64 permuted(u64 a, u64 b, u64 selector) {
  u64 both = u64(u32(a)) | b << 32, out = 0;
  for (int i = 0; i < 4; i++) {
    u64 select = selector >> (4 * i) & 15, byte = both >> (8 * (select & 7)) & 255;
    if (select & 8) byte = byte & 128 ? 255 : 0;  // its sign, as often as there are bits
    out |= byte << (8 * i);
  }
  return out;
}

u64 looked_up(u32 a, u32 b, u32 c, u32 table) {
  u32 out = 0;
  for (int row = 0; row < 8; row++)
    if (table >> row & 1) out |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return out;
}

u64 reversed(u64 v, int width) {
  u64 out = 0;
  for (int i = 0; i < width; i++) out |= (v >> i & 1) << (width - 1 - i);
  return out;
}

void map_bits(Warp& warp, const Instruction& in, u32 mask) {
  const int width = 8 * bytes_of(in.type);
  u64* d = warp.reg(in.d[0]);
  const u64* s[4] = {};
  for (size_t i = 0; i < in.s.size(); i++) s[i] = warp.reg(in.s[i]);
  each_lane(mask, [&](int l) {
    u64 a = s[0][l], b = s[1] ? s[1][l] : 0, c = s[2] ? s[2][l] : 0, e = s[3] ? s[3][l] : 0;
    switch (in.op) {
      case Op::bfe: d[l] = extracted(in.type, a, b, c); break;
      case Op::bfi: d[l] = inserted(a, b, c, e); break;
      case Op::prmt: d[l] = permuted(a, b, c); break;
      case Op::lop3: d[l] = looked_up(u32(a), u32(b), u32(c), u32(e)); break;
      case Op::shf: {
        u64 both = u64(u32(a)) | b << 32;
        u32 by = in.mode & 2 ? std::min(u32(c), 32u) : u32(c) & 31;
        d[l] = in.mode & 1 ? u32(both >> by) : u32(both << by >> 32);
        break;
      }
      case Op::clz: {
        u64 v = integer(in.type, a);
        d[l] = v ? u64(__builtin_clzll(v) - (64 - width)) : u64(width);
        break;
      }
      case Op::popc: d[l] = u64(__builtin_popcountll(integer(in.type, a))); break;
      default: d[l] = reversed(a, width);
    }
  });
}

// --- comparisons

template <class T> bool holds(Compare c, T a, T b) {
  bool is_ordered = a == a && b == b;
  switch (c) {
    case Compare::eq: return a == b;
    case Compare::ne: return is_ordered && a != b;
    case Compare::lt: return a < b;
    case Compare::le: return a <= b;
    case Compare::gt: return a > b;
    case Compare::ge: return a >= b;
    case Compare::ltu: return !(a >= b);
    case Compare::leu: return !(a > b);
    case Compare::gtu: return !(a <= b);
    case Compare::geu: return !(a < b);
    case Compare::equ: return a == b || !is_ordered;
    case Compare::neu: return a != b;
    case Compare::num: return is_ordered;
    default: return !is_ordered;
  }
}

bool compared(const Instruction& in, Type type, u64 a, u64 b) {
  Compare how = Compare(in.mode);
  if (type == Type::f32) {
    float x = bits<float>(a), y = bits<float>(b);
    return in.flushes ? holds(how, flush(x), flush(y)) : holds(how, x, y);
  }
  if (type == Type::f64) return holds(how, bits<double>(a), bits<double>(b));
  if (is_scalar_float(type)) return holds(how, widen(type, uint16_t(a)), widen(type, uint16_t(b)));
  a = integer(type, a), b = integer(type, b);
  return is_signed(type) ? holds(how, i64(a), i64(b)) : holds(how, a, b);
}

// setp{.and} p|q, a, b{, {!}c}: p is the comparison (and c), q its contrary (and c)
void compare(Warp& warp, const Instruction& in, u32 mask) {
  u64 *a = warp.reg(in.s[0]), *b = warp.reg(in.s[1]), *c = in.combine ? warp.reg(in.s[2]) : nullptr;
  u64 *p = in.d[0] >= 0 ? warp.reg(in.d[0]) : nullptr;
  u64 *q = in.d.size() > 1 && in.d[1] >= 0 ? warp.reg(in.d[1]) : nullptr;
  each_lane(mask, [&](int l) {
    bool yes = compared(in, in.type, a[l], b[l]);
    auto with = [&](bool x) {
      if (!in.combine) return x;
      bool other = (c[l] & 1) != in.negated[2];
      return in.combine == 1 ? x && other : in.combine == 2 ? x || other : x != other;
    };
    bool first = with(yes), second = with(!yes);
    if (p) p[l] = first;
    if (q) q[l] = second;
  });
}

// set.lt.f32.s32: ones, or the number 1, in the type that comes first
void set(Warp& warp, const Instruction& in, u32 mask) {
  u64 *d = warp.reg(in.d[0]), *a = warp.reg(in.s[0]), *b = warp.reg(in.s[1]);
  u64 yes = in.type == Type::f32 ? raw(1.f) : is_scalar_float(in.type) ? narrow(in.type, 1.) : ~u64(0);
  each_lane(mask, [&](int l) { d[l] = compared(in, in.from, a[l], b[l]) ? yes : 0; });
}

template <bool LARGER> void extreme(Warp& warp, const Instruction& in, u32 mask) {
  if (is_float(in.type)) {
    // Of one NaN and a number it is the number, but under .NaN.
    map_floats(warp, in, mask, [&](auto x, auto y) {
      if (in.keeps_nan && (x != x || y != y)) return decltype(x)(NAN);
      return LARGER ? std::fmax(x, y) : std::fmin(x, y);
    });
  } else {
    map_whole(warp, in, mask, [](auto x, auto y) { return LARGER ? std::max(x, y) : std::min(x, y); });
  }
}

}  // namespace

bool arithmetic(Warp& warp, const Instruction& in, u32 mask) {
  const bool is_of_floats = is_float(in.type);
  switch (in.op) {
    // Sums, products and bits of whole numbers are the same in 64 bits, as far as their type goes.
    case Op::add:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x, auto y) { return x + y; });
      else map<u64>(warp, in, mask, [](u64 x, u64 y) { return x + y; });
      return true;
    case Op::sub:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x, auto y) { return x - y; });
      else map<u64>(warp, in, mask, [](u64 x, u64 y) { return x - y; });
      return true;
    case Op::mul:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x, auto y) { return x * y; });
      else multiply(warp, in, mask);
      return true;
    case Op::mad: case Op::fma:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x, auto y, auto z) { return std::fma(x, y, z); });
      else multiply(warp, in, mask);
      return true;
    case Op::div:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x, auto y) { return x / y; });
      else map_whole(warp, in, mask, [](auto x, auto y) { return quotient(x, y); });
      return true;
    case Op::rem: map_whole(warp, in, mask, [](auto x, auto y) { return remainder_of(x, y); }); return true;
    case Op::min: extreme<false>(warp, in, mask); return true;
    case Op::max: extreme<true>(warp, in, mask); return true;
    case Op::neg:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x) { return -x; });
      else map<u64>(warp, in, mask, [](u64 x) { return u64(0) - x; });
      return true;
    case Op::abs:
      if (is_of_floats) map_floats(warp, in, mask, [](auto x) { return std::fabs(x); });
      else map_whole(warp, in, mask, [](auto x) { return i64(x) < 0 ? u64(0) - u64(x) : u64(x); });
      return true;
    case Op::not_:
      if (in.type == Type::pred) map<u64>(warp, in, mask, [](u64 x) { return (x & 1) ^ 1; });
      else map<u64>(warp, in, mask, [](u64 x) { return ~x; });
      return true;
    case Op::and_: map<u64>(warp, in, mask, [](u64 x, u64 y) { return x & y; }); return true;
    case Op::or_: map<u64>(warp, in, mask, [](u64 x, u64 y) { return x | y; }); return true;
    case Op::xor_: map<u64>(warp, in, mask, [](u64 x, u64 y) { return x ^ y; }); return true;
    case Op::shl: case Op::shr: shift(warp, in, mask); return true;
    case Op::setp: compare(warp, in, mask); return true;
    case Op::set: set(warp, in, mask); return true;
    case Op::selp: {
      const u64 contrary = in.negated[2];
      map<u64>(warp, in, mask, [&](u64 a, u64 b, u64 c) { return (c & 1) ^ contrary ? a : b; });
      return true;
    }
    case Op::copysign: map<float>(warp, in, mask, [](float a, float b) { return std::copysign(b, a); }); return true;
    case Op::bfe: case Op::bfi: case Op::prmt: case Op::lop3: case Op::shf: case Op::clz: case Op::popc: case Op::brev:
      map_bits(warp, in, mask);
      return true;
    case Op::ex2: map_floats(warp, in, mask, [](auto x) { return std::exp2(x); }); return true;
    case Op::lg2: map_floats(warp, in, mask, [](auto x) { return std::log2(x); }); return true;
    case Op::rcp: map_floats(warp, in, mask, [](auto x) { return decltype(x)(1) / x; }); return true;
    case Op::sqrt: map_floats(warp, in, mask, [](auto x) { return std::sqrt(x); }); return true;
    case Op::rsqrt: map_floats(warp, in, mask, [](auto x) { return decltype(x)(1) / std::sqrt(x); }); return true;
    case Op::sin: map_floats(warp, in, mask, [](auto x) { return std::sin(x); }); return true;
    case Op::cos: map_floats(warp, in, mask, [](auto x) { return std::cos(x); }); return true;
    case Op::tanh: map_floats(warp, in, mask, [](auto x) { return std::tanh(x); }); return true;
    default: return false;
  }
}

}  // namespace ptx
