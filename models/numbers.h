// Functions of numbers, float or bfloat16, of which a compiler makes functions of whole registers; and GEGLU.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define INLINE static inline __attribute__((always_inline))

struct bf16 {
    uint16_t bits;
};

template <class T>
INLINE T as(uint32_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

INLINE float get(float value) { return value; }
INLINE float get(bf16 value) { return as<float>(uint32_t(value.bits) << 16); }
INLINE void put(float &to, float value) { to = value; }
INLINE void put(bf16 &to, float value) {  // to the nearest, ties to even; not a number stays none
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to.bits = uint16_t(value != value ? 0x7fc0u : rounded);
}

// exp(x) for x in [-87, 88], beyond which it stays at its ends. As exact as T can tell: to 2 units in the
// last place of a float, or to 1e-4, a twentieth of what bfloat16 rounds.
template <class T>
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f), p;
    if (sizeof(T) == sizeof(float)) {
        float r = std::fma(n, -0.693359375f, x);
        r = std::fma(n, 2.12194440e-4f, r);
        p = 1.9875691500e-4f;  // the minimax polynomial of Cephes (Moshier 1992)
        p = std::fma(p, r, 1.3981999507e-3f);
        p = std::fma(p, r, 8.3334519073e-3f);
        p = std::fma(p, r, 4.1665795894e-2f);
        p = std::fma(p, r, 1.6666665459e-1f);
        p = std::fma(p, r, 5.0000001201e-1f);
        p = std::fma(p, r * r, r + 1.0f);
    } else {
        float r = std::fma(x, 1.44269504f, -n);  // 2^r on [-1/2, 1/2], a minimax fit
        p = 5.51716685e-2f;
        p = std::fma(p, r, 2.42611125e-1f);
        p = std::fma(p, r, 6.93260968e-1f);
        p = std::fma(p, r, 9.99928057e-1f);
    }
    return p * as<float>(uint32_t(int32_t(n) + 127) << 23);
}

// The normal distribution's Phi(x), and exp(-x*x/2) beside it. The form is that of Abramowitz and Stegun
// 1964, 7.1.26, of another degree: Phi(-|x|) = exp(-x*x/2) * P(t), t = 1 / (1 + 0.3*|x|),
// with a minimax fit of P without a constant term.
template <class T>
INLINE float normal_share(float x, float &bell) {
    float t = 1.0f / std::fma(0.3f, std::fabs(x), 1.0f), p;
    bell = exponential<T>(-0.5f * x * x);
    if (sizeof(T) == sizeof(float)) {
        p = 0.0361966286f;  // relative error below 2e-7
        p = std::fma(p, t, -0.159385259f);
        p = std::fma(p, t, 0.210129593f);
        p = std::fma(p, t, -0.057176957f);
        p = std::fma(p, t, 0.130421153f);
        p = std::fma(p, t, 0.0993458099f);
        p = std::fma(p, t, 0.120845724f);
        p = std::fma(p, t, 0.119623251f);
    } else {
        p = 0.208842948f;  // below 3e-4
        p = std::fma(p, t, 0.0355907381f);
        p = std::fma(p, t, 0.137476653f);
        p = std::fma(p, t, 0.118204616f);
    }
    float tail = bell * (p * t);
    return x < 0.0f ? tail : 1.0f - tail;
}

constexpr float ROOT = 0.3989422804f;  // 1 / sqrt(2 pi)

// GEGLU of a row x [2 width] of what is scaled and its gate: y [width] = first half * gelu(second half).
template <class T>
static void gate(int64_t width, const T *x, T *y) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float g = get(x[width + j]), bell;
        put(y[j], get(x[j]) * g * normal_share<T>(g, bell));
    }
}

// The gradient of the row, which may take its place, and y again where that is no null.
template <class T>
static void of_gate(int64_t width, const T *x, const T *of_y, T *of_x, T *y) {
#pragma omp simd
    for (int64_t j = 0; j < width; j++) {
        float value = get(x[j]), g = get(x[width + j]), dy = get(of_y[j]), bell;
        float share = normal_share<T>(g, bell);
        if (y) put(y[j], value * g * share);
        put(of_x[j], dy * g * share);
        put(of_x[width + j], dy * value * (share + g * ROOT * bell));
    }
}
