// Passes over memory that torch makes several of, each in one: normalisation with SiLU, and GEGLU; both ways.
//
// Compiled by models/kernels.py with the compiler of the machine, for its processor; called from
// models/fused.py. Tensors are dense; numbers of type T are float or bfloat16, arithmetic is in float. Sums
// that cross the samples of a batch are left to the caller, so that no bit depends on the number of threads.

#include <cmath>
#include <cstdint>
#include <vector>

#include "numbers.h"

template <class T>
INLINE float sigmoid(float x) {
    return 1.0f / (1.0f + exponential<T>(-x));
}

struct Shape {
    int64_t samples, channels, positions, groups;
    int64_t row;  // channels where each sample has its own gain and bias, 0 where all have one
};

// Channels-last or not, a sample is walked as `outer` rows of `inner` numbers: rows are positions and numbers
// channels, or the other way round. PER(i, j) is the channel.
template <bool LAST>
INLINE int64_t channel(int64_t i, int64_t j) {
    return LAST ? j : i;
}

// Sums over positions, one a channel: `each(x, channel)` returns what is summed.
template <bool LAST, class T, class F>
INLINE void sums(const T *x, const Shape &shape, float *total, F each) {
    const int64_t C = shape.channels, N = shape.positions;
    if (LAST) {
        for (int64_t c = 0; c < C; c++) total[c] = 0.0f;
        for (int64_t n = 0; n < N; n++) {
            const T *row = x + n * C;
#pragma omp simd
            for (int64_t c = 0; c < C; c++) total[c] += each(get(row[c]), c);
        }
    } else {
        for (int64_t c = 0; c < C; c++) {
            const T *row = x + c * N;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t n = 0; n < N; n++) sum += each(get(row[n]), c);
            total[c] = sum;
        }
    }
}

INLINE void over_groups(const Shape &shape, const float *by_channel, float *by_group, float factor) {
    const int64_t width = shape.channels / shape.groups;
    for (int64_t g = 0; g < shape.groups; g++) {
        float sum = 0.0f;
        for (int64_t c = g * width; c < (g + 1) * width; c++) sum += by_channel[c];
        by_group[g] = sum * factor;
    }
}

template <bool LAST, bool SILU, class T>
static void norm_forward(const Shape &shape, float eps, const T *x, const float *before, const float *gain,
                         const float *bias, T *y, float *mean, float *scale, int threads) {
    const int64_t C = shape.channels, N = shape.positions, G = shape.groups, width = C / G;
    const float share = 1.0f / float(N * width);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < shape.samples; b++) {
        std::vector<float> space(4 * C);
        float *sum = space.data(), *centre = sum + C, *a = centre + C, *d = a + C;
        const T *from = x + b * C * N;
        T *to = y + b * C * N;
        float *mu = mean + b * G, *rs = scale + b * G;
        sums<LAST>(from, shape, sum, [](float value, int64_t) { return value; });
        if (before)
            for (int64_t c = 0; c < C; c++) sum[c] += float(N) * before[b * C + c];
        over_groups(shape, sum, mu, share);
        for (int64_t c = 0; c < C; c++) centre[c] = mu[c / width] - (before ? before[b * C + c] : 0.0f);
        sums<LAST>(from, shape, sum, [=](float value, int64_t c) {
            float off = value - centre[c];
            return off * off;
        });
        over_groups(shape, sum, rs, share);
        for (int64_t g = 0; g < G; g++) rs[g] = 1.0f / std::sqrt(rs[g] + eps);
        for (int64_t c = 0; c < C; c++) {
            a[c] = gain[b * shape.row + c] * rs[c / width];
            d[c] = bias[b * shape.row + c];
        }
        const int64_t outer = LAST ? N : C, inner = LAST ? C : N;
        for (int64_t i = 0; i < outer; i++) {
            const T *row = from + i * inner;
            T *out = to + i * inner;
#pragma omp simd
            for (int64_t j = 0; j < inner; j++) {
                const int64_t c = channel<LAST>(i, j);
                float z = std::fma(get(row[j]) - centre[c], a[c], d[c]);
                put(out[j], SILU ? z * sigmoid<T>(z) : z);
            }
        }
    }
}

// `of_gain` and `of_bias` [samples channels] are the gradients of a gain and a bias of each sample's own, and
// `of_before` of what was added before, where that is no null.
template <bool LAST, bool SILU, class T>
static void norm_backward(const Shape &shape, const T *x, const float *before, const float *gain,
                          const float *bias, const float *mean, const float *scale, const T *of_y, T *of_x,
                          float *of_before, float *of_gain, float *of_bias, int threads) {
    const int64_t C = shape.channels, N = shape.positions, G = shape.groups, width = C / G;
    const float share = 1.0f / float(N * width);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < shape.samples; b++) {
        std::vector<float> space(8 * C + 2 * G);
        float *centre = space.data(), *rs = centre + C, *a = rs + C, *d = a + C, *s1 = d + C, *s2 = s1 + C;
        float *u = s2 + C, *v = u + C, *k1 = v + C, *k2 = k1 + G;
        const T *from = x + b * C * N, *up = of_y + b * C * N;
        T *to = of_x + b * C * N;
        for (int64_t c = 0; c < C; c++) {
            centre[c] = mean[b * G + c / width] - (before ? before[b * C + c] : 0.0f);
            rs[c] = scale[b * G + c / width];
            a[c] = gain[b * shape.row + c];
            d[c] = bias[b * shape.row + c];
            s1[c] = s2[c] = 0.0f;
        }
        const int64_t outer = LAST ? N : C, inner = LAST ? C : N;
        // The gradient before the SiLU goes into the output, where the second pass reads it.
        for (int64_t i = 0; i < outer; i++) {
            const T *row = from + i * inner, *g = up + i * inner;
            T *out = to + i * inner;
            float one = 0.0f, two = 0.0f;
            auto gradient = [&](int64_t j, int64_t c, float &unit) {
                unit = (get(row[j]) - centre[c]) * rs[c];
                float dz = get(g[j]);
                if (SILU) {
                    float z = std::fma(unit, a[c], d[c]), s = sigmoid<T>(z);
                    dz *= s * (1.0f + z * (1.0f - s));
                }
                return dz;
            };
            if (LAST) {
#pragma omp simd
                for (int64_t j = 0; j < inner; j++) {
                    float unit, dz = gradient(j, j, unit);
                    put(out[j], dz);
                    s1[j] += dz;
                    s2[j] += dz * unit;
                }
            } else {
#pragma omp simd reduction(+ : one, two)
                for (int64_t j = 0; j < inner; j++) {
                    float unit, dz = gradient(j, i, unit);
                    put(out[j], dz);
                    one += dz;
                    two += dz * unit;
                }
                s1[i] = one;
                s2[i] = two;
            }
        }
        for (int64_t c = 0; c < C; c++) {
            of_bias[b * C + c] = s1[c];
            of_gain[b * C + c] = s2[c];
            u[c] = a[c] * s1[c];
            v[c] = a[c] * s2[c];
        }
        over_groups(shape, u, k1, share);
        over_groups(shape, v, k2, share);
        for (int64_t c = 0; c < C; c++) {
            a[c] *= rs[c];
            u[c] = rs[c] * k1[c / width];
            v[c] = rs[c] * rs[c] * k2[c / width];
        }
        for (int64_t i = 0; i < outer; i++) {
            const T *row = from + i * inner;
            T *out = to + i * inner;
#pragma omp simd
            for (int64_t j = 0; j < inner; j++) {
                const int64_t c = channel<LAST>(i, j);
                put(out[j], a[c] * get(out[j]) - u[c] - (get(row[j]) - centre[c]) * v[c]);
            }
        }
        if (of_before) sums<LAST>(to, shape, of_before + b * C, [](float value, int64_t) { return value; });
    }
}

template <class T>
static void gate_forward(int64_t rows, int64_t width, const T *x, T *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) gate(width, x + 2 * i * width, y + i * width);
}

template <class T>
static void gate_backward(int64_t rows, int64_t width, const T *x, const T *of_y, T *of_x, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++)
        of_gate<T>(width, x + 2 * i * width, of_y + i * width, of_x + 2 * i * width, nullptr);
}

#define CHOOSE(NAME, T, ...)                                                                 \
    (last ? (silu ? NAME<true, true, T>(__VA_ARGS__) : NAME<true, false, T>(__VA_ARGS__))    \
          : (silu ? NAME<false, true, T>(__VA_ARGS__) : NAME<false, false, T>(__VA_ARGS__)))

#define EXPORT(SUFFIX, T)                                                                                     \
    extern "C" void norm_forward_##SUFFIX(const Shape *shape, float eps, const T *x, const float *before,     \
                                          const float *gain, const float *bias, T *y, float *mean,            \
                                          float *scale, int last, int silu, int threads) {                    \
        CHOOSE(norm_forward, T, *shape, eps, x, before, gain, bias, y, mean, scale, threads);                 \
    }                                                                                                         \
    extern "C" void norm_backward_##SUFFIX(const Shape *shape, const T *x, const float *before,               \
                                           const float *gain, const float *bias, const float *mean,           \
                                           const float *scale, const T *of_y, T *of_x, float *of_before,      \
                                           float *of_gain, float *of_bias, int last, int silu, int threads) { \
        CHOOSE(norm_backward, T, *shape, x, before, gain, bias, mean, scale, of_y, of_x, of_before, of_gain,  \
               of_bias, threads);                                                                             \
    }                                                                                                         \
    extern "C" void gate_forward_##SUFFIX(int64_t rows, int64_t width, const T *x, T *y, int threads) {       \
        gate_forward<T>(rows, width, x, y, threads);                                                          \
    }                                                                                                         \
    extern "C" void gate_backward_##SUFFIX(int64_t rows, int64_t width, const T *x, const T *of_y, T *of_x,   \
                                           int threads) {                                                     \
        gate_backward<T>(rows, width, x, of_y, of_x, threads);                                                \
    }

EXPORT(float, float)
EXPORT(bfloat16, bf16)
