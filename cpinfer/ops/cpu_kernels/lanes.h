// Numbers side by side in a register: what the kernels of this folder compute with.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace {

// As many lanes as a register has, and as many registers of a row at once as leave others for the sums of four queries.
// No bit depends on either: the sum of a tile's weights is one tree, however many of its levels lie within a register.
#if defined(__AVX512F__)
constexpr int LANES = 16, HELD = 4;
#elif defined(__AVX__)
constexpr int LANES = 8, HELD = 2;
#else
constexpr int LANES = 4, HELD = 2;
#endif
constexpr float NONE = -std::numeric_limits<float>::infinity();
typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntLanes __attribute__((vector_size(LANES * sizeof(float))));
typedef Lanes LanesInMemory __attribute__((aligned(alignof(float)), may_alias));

inline Lanes load(const float* from) { return *reinterpret_cast<const LanesInMemory*>(from); }
inline void store(Lanes lanes, float* to) { *reinterpret_cast<LanesInMemory*>(to) = lanes; }

inline Lanes all(float x) {
    Lanes lanes = {};
    return lanes + x;
}

// exp of x <= 0, by 2^n times a polynomial (Cephes); 0 below -87, where float32 has no normal numbers left.
inline Lanes exp_lanes(Lanes x) {
    IntLanes is_zero = x < -87.0f;
    x = is_zero ? all(-87.0f) : x;
    Lanes shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to the nearest: no fraction is left so high
    IntLanes power;
    std::memcpy(&power, &shifted, sizeof power);
    power -= 0x4B400000;
    Lanes n = shifted - 12582912.0f;
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    Lanes y = all(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    Lanes square = x * x;
    y = y * square + x;
    y = y + 1.0f;
    IntLanes bits = (power + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &bits, sizeof scale);
    y = y * scale;
    return is_zero ? all(0.0f) : y;
}

inline float exp_one(float x) { return exp_lanes(all(x))[0]; }

// Lane i and lane i + HALF, for every i: half the lanes of a tree.
template <int HALF>
inline Lanes other_half(Lanes x) {
    IntLanes places;
    for (int i = 0; i < LANES; i++) places[i] = i ^ HALF;
    return __builtin_shuffle(x, places);
}

inline Lanes larger(Lanes a, Lanes b) { return a > b ? a : b; }

inline float largest(Lanes x) {
    if constexpr (LANES > 8) x = larger(x, other_half<8>(x));
    if constexpr (LANES > 4) x = larger(x, other_half<4>(x));
    x = larger(x, other_half<2>(x));
    return larger(x, other_half<1>(x))[0];
}

// As a tree: ((x0 + x8) + (x4 + x12)) + ... ; adding commutes, so both lanes of a pair hold the same bits.
inline float sum(Lanes x) {
    if constexpr (LANES > 8) x = x + other_half<8>(x);
    if constexpr (LANES > 4) x = x + other_half<4>(x);
    x = x + other_half<2>(x);
    return (x + other_half<1>(x))[0];
}

}  // namespace
