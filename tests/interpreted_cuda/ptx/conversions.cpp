// cvt: numbers of one type as numbers of another.
#include "machine.h"

namespace ptx {

namespace {

double rounded_to_whole(double v, Round round) {
  switch (round) {
    case Round::zero: return std::trunc(v);
    case Round::down: return std::floor(v);
    case Round::up: return std::ceil(v);
    default: return std::nearbyint(v);
  }
}

// The bits of a number of type `to`, a whole one of fewer bits than 128 or not.
u64 saturated(Type to, double v) {
  if (v != v) return 0;
  const int width = 8 * bytes_of(to);
  const double end = std::ldexp(1., is_signed(to) ? width - 1 : width);
  if (is_signed(to)) {
    if (v >= end) return (u64(1) << (width - 1)) - 1;
    if (v < -end) return integer(to, u64(1) << (width - 1));
    return u64(i64(v));
  }
  if (v <= 0) return 0;
  if (v >= end) return width == 64 ? ~u64(0) : (u64(1) << width) - 1;
  return u64(v);
}

double float_in(const Instruction& in, Type type, u64 v) {
  if (type == Type::f64) return bits<double>(v);
  if (type == Type::f32) return in.flushes ? flush(bits<float>(v)) : bits<float>(v);
  return widen(type, uint16_t(v));
}

// Towards zero, the neighbour of what is nearest where that is larger.
u64 float_out(Type to, double v, Round round) {
  if (to == Type::f64) return raw(v);
  bool cuts = round == Round::zero;
  if (to == Type::f32) {
    float f = float(v);
    if (cuts && std::fabs(double(f)) > std::fabs(v)) f = std::nextafterf(f, 0.f);
    return raw(f);
  }
  uint16_t h = narrow(to, v);
  return cuts && std::fabs(widen(to, h)) > std::fabs(v) ? u64(h - 1) : u64(h);
}

u64 whole_to_whole(const Instruction& in, u64 a) {
  u64 v = integer(in.from, a);
  if (!in.saturates) return integer(in.type, v);
  const int width = 8 * bytes_of(in.type);
  if (is_signed(in.type)) {
    i64 most = i64((u64(1) << (width - 1)) - 1);
    if (!is_signed(in.from) && v > u64(most)) return u64(most);
    return u64(std::min(most, std::max(-most - 1, i64(v))));
  }
  if (is_signed(in.from) && i64(v) < 0) return 0;
  return std::min(v, width == 64 ? ~u64(0) : (u64(1) << width) - 1);
}

u64 whole_to_float(const Instruction& in, u64 a) {
  u64 v = integer(in.from, a);
  bool has_sign = is_signed(in.from);
  if (in.type == Type::f32) return has_sign ? raw(float(i64(v))) : raw(float(v));
  double wide = has_sign ? double(i64(v)) : double(v);
  return in.type == Type::f64 ? raw(wide) : narrow(in.type, wide);
}

u64 converted(const Instruction& in, u64 a) {
  if (!is_float(in.from)) return is_float(in.type) ? whole_to_float(in, a) : whole_to_whole(in, a);
  double v = float_in(in, in.from, a);
  if (in.to_integral || !is_float(in.type)) v = rounded_to_whole(v, in.round);
  if (!is_float(in.type)) return saturated(in.type, v);
  if (in.saturates) v = v != v ? 0. : std::min(1., std::max(0., v));
  u64 out = float_out(in.type, v, in.to_integral ? Round::nearest : in.round);
  return in.flushes && in.type == Type::f32 ? raw(flush(bits<float>(out))) : out;
}

// The first operand becomes the upper half.
u64 packed_pair(const Instruction& in, u64 upper, u64 lower) {
  double high = float_in(in, Type::f32, upper), low = float_in(in, Type::f32, lower);
  if (is_eight_bit_float(in.type))
    return u64(double_to_eight_bits(in.type, high)) << 8 | double_to_eight_bits(in.type, low);
  return float_out(in.type, high, in.round) << 16 | float_out(in.type, low, in.round);
}

u64 pair_to_pair(const Instruction& in, u64 a) {
  if (is_eight_bit_float(in.from)) {
    u64 low = narrow(in.type, eight_bits_to_double(in.from, uint8_t(a)));
    return low | u64(narrow(in.type, eight_bits_to_double(in.from, uint8_t(a >> 8)))) << 16;
  }
  u64 low = double_to_eight_bits(in.type, widen(in.from, uint16_t(a)));
  return low | u64(double_to_eight_bits(in.type, widen(in.from, uint16_t(a >> 16)))) << 8;
}

bool is_pair(Type type) { return is_packed(type) || is_eight_bit_float(type); }

}  // namespace

void convert(Warp& warp, const Instruction& in, u32 mask) {
  u64 *d = warp.reg(in.d[0]), *a = warp.reg(in.s[0]);
  if (in.s.size() == 2) {
    u64* b = warp.reg(in.s[1]);
    each_lane(mask, [&](int l) { d[l] = packed_pair(in, a[l], b[l]); });
  } else if (is_pair(in.type)) {
    each_lane(mask, [&](int l) { d[l] = pair_to_pair(in, a[l]); });
  } else {
    each_lane(mask, [&](int l) { d[l] = converted(in, a[l]); });
  }
}

}  // namespace ptx
