// The types of PTX, and what their bits mean. A register is 64 bits wide; bits above its type's mean nothing.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

namespace ptx {

using u32 = uint32_t;
using u64 = uint64_t;
using i64 = int64_t;

enum class Type : uint8_t {
  none, b8, u8, s8, b16, u16, s16, f16, bf16, b32, u32, s32, f32, b64, u64, s64, f64, b128, pred,
  f16x2, bf16x2, e4m3x2, e5m2x2
};

// Type::none where no type has this name.
Type type_of(const std::string& name);

inline int bytes_of(Type t) {
  switch (t) {
    case Type::b8: case Type::u8: case Type::s8: return 1;
    case Type::b16: case Type::u16: case Type::s16: case Type::f16: case Type::bf16: return 2;
    case Type::e4m3x2: case Type::e5m2x2: return 2;
    case Type::b32: case Type::u32: case Type::s32: case Type::f32: case Type::f16x2: case Type::bf16x2: return 4;
    case Type::b64: case Type::u64: case Type::s64: case Type::f64: return 8;
    case Type::b128: return 16;
    default: return 0;
  }
}
inline bool is_signed(Type t) { return t == Type::s8 || t == Type::s16 || t == Type::s32 || t == Type::s64; }
inline bool is_packed(Type t) { return t == Type::f16x2 || t == Type::bf16x2; }
inline bool is_scalar_float(Type t) { return t == Type::f16 || t == Type::bf16 || t == Type::f32 || t == Type::f64; }
inline bool is_float(Type t) { return is_scalar_float(t) || is_packed(t); }
inline bool is_eight_bit_float(Type t) { return t == Type::e4m3x2 || t == Type::e5m2x2; }

template <class T> inline T bits(u64 v) { T t; memcpy(&t, &v, sizeof(T)); return t; }
template <class T> inline u64 raw(T t) { u64 v = 0; memcpy(&v, &t, sizeof(T)); return v; }

// The value in 64 bits: zeros above it, or its sign.
inline u64 integer(Type t, u64 v) {
  switch (t) {
    case Type::b8: case Type::u8: return uint8_t(v);
    case Type::s8: return u64(i64(int8_t(v)));
    case Type::b16: case Type::u16: return uint16_t(v);
    case Type::s16: return u64(i64(int16_t(v)));
    case Type::b32: case Type::u32: return u32(v);
    case Type::s32: return u64(i64(int32_t(v)));
    default: return v;
  }
}

// --- half precision, by way of double: products and sums of two are exact there, so what follows rounds once

inline float flush(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.f, f) : f; }

// float32 that, rounded again to fewer bits, gives what rounding `v` at once would: what is lost makes the last bit odd.
inline float to_odd(double v) {
  float f = float(v);
  if (double(f) == v || v != v || std::isinf(v)) return f;
  if (std::fabs(double(f)) > std::fabs(v)) f = std::nextafterf(f, 0.f);
  return bits<float>(raw(f) | 1);
}

inline double half_to_double(uint16_t h) { return double(bits<_Float16>(h)); }
inline double bfloat_to_double(uint16_t h) { return double(bits<float>(u64(h) << 16)); }
inline uint16_t float_to_bfloat(float f) {
  if (f != f) return 0x7fff;
  u32 u = u32(raw(f));
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
inline bool is_half(Type t) { return t == Type::f16 || t == Type::f16x2; }
inline double widen(Type t, uint16_t h) { return is_half(t) ? half_to_double(h) : bfloat_to_double(h); }
inline uint16_t narrow(Type t, double v) {
  float f = to_odd(v);
  return is_half(t) ? uint16_t(raw(_Float16(f))) : float_to_bfloat(f);
}

// --- eight bits: e4m3 (without infinities) and e5m2

double eight_bits_to_double(Type t, uint8_t v);
uint8_t double_to_eight_bits(Type t, double v);  // of what is too large, the largest

}  // namespace ptx
