#include "types.h"

#include <map>

namespace ptx {

Type type_of(const std::string& name) {
  static const std::map<std::string, Type> types = {
      {"b8", Type::b8}, {"u8", Type::u8}, {"s8", Type::s8}, {"b16", Type::b16}, {"u16", Type::u16}, {"s16", Type::s16},
      {"f16", Type::f16}, {"bf16", Type::bf16}, {"b32", Type::b32}, {"u32", Type::u32}, {"s32", Type::s32},
      {"f32", Type::f32}, {"b64", Type::b64}, {"u64", Type::u64}, {"s64", Type::s64}, {"f64", Type::f64},
      {"b128", Type::b128}, {"pred", Type::pred}, {"f16x2", Type::f16x2}, {"bf16x2", Type::bf16x2},
      {"e4m3x2", Type::e4m3x2}, {"e5m2x2", Type::e5m2x2}};
  auto found = types.find(name);
  return found == types.end() ? Type::none : found->second;
}

namespace {
struct Format { int mantissa, bias; double largest; };
Format format_of(Type t) { return t == Type::e4m3x2 ? Format{3, 7, 448.} : Format{2, 15, 57344.}; }
}  // namespace

double eight_bits_to_double(Type t, uint8_t v) {
  Format f = format_of(t);
  int magnitude = v & 127, fraction = magnitude & ((1 << f.mantissa) - 1), exponent = magnitude >> f.mantissa;
  double size;
  if (t == Type::e4m3x2 && magnitude == 127) size = NAN;
  else if (t == Type::e5m2x2 && exponent == 31) size = fraction ? NAN : INFINITY;
  else if (!exponent) size = std::ldexp(double(fraction), 1 - f.bias - f.mantissa);
  else size = std::ldexp(double(fraction + (1 << f.mantissa)), exponent - f.bias - f.mantissa);
  return v & 128 ? -size : size;
}

uint8_t double_to_eight_bits(Type t, double v) {
  Format f = format_of(t);
  uint8_t sign = std::signbit(v) ? 128 : 0;
  if (v != v) return 127;
  double size = std::min(std::fabs(v), f.largest);
  if (size == 0) return sign;
  int exponent = std::max(std::ilogb(size), 1 - f.bias);
  // Steps between neighbours at this exponent; a carry moves to the next exponent by itself.
  int steps = int(std::nearbyint(std::ldexp(size, f.mantissa - exponent)));
  return uint8_t(sign | (((exponent + f.bias - 1) << f.mantissa) + steps));
}

}  // namespace ptx
