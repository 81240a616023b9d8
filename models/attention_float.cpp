// Attention and its gradients in float32, a few queries at a time, so that no score leaves the cache.
//
// As attention_bfloat16.cpp does it, with the products of product.h. Called from models/attention.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "heads.h"
#include "numbers.h"
#include "product.h"

constexpr int64_t QUERIES = 48;  // at a time

INLINE int64_t padded(int64_t count) { return (count + LANES - 1) / LANES * LANES; }
// From a row of scores to the next; a power of two would fall on the same lines of a cache.
INLINE int64_t apart(int64_t keys) { return padded(keys) + LANES; }

// Rows [rows width], zeros up to `into`.
static void copy_rows(const float *from, int64_t stride, int64_t rows, int64_t width, int64_t into, float *to) {
    for (int64_t i = 0; i < rows; i++) {
        std::memcpy(to + i * into, from + i * stride, width * sizeof(float));
        std::fill(to + i * into + width, to + (i + 1) * into, 0.0f);
    }
}

// Rows [rows width] as panels [padded(width)/PANEL rows PANEL], zeros beyond the width.
static void along_rows(const float *from, int64_t stride, int64_t rows, int64_t width, float *panels) {
    const int64_t columns = padded(width);
    for (int64_t c = 0; c < columns; c += PANEL) {
        const int64_t W = wide(columns, c);
        copy_rows(from + c, stride, rows, std::min(W, width - c), W, panels + c * rows);
    }
}

// The same rows transposed: panels [padded(rows)/PANEL width PANEL], zeros beyond the rows.
static void across_rows(const float *from, int64_t stride, int64_t rows, int64_t width, float *panels) {
    const int64_t columns = padded(rows);
    for (int64_t c = 0; c < columns; c += PANEL) {
        const int64_t W = wide(columns, c);
        float *to = panels + c * width;
        for (int64_t j = 0; j < W; j++)
            for (int64_t d = 0; d < width; d++) to[d * W + j] = c + j < rows ? from[(c + j) * stride + d] : 0.0f;
    }
}

// exp(by * x - level), 0 for what may not be seen.
INLINE float share_of(float x, float by, float level) {
    const float power = std::fma(by, x, -level);
    return power < -87.0f ? 0.0f : exponential<float>(power);
}

// `level` [batch heads queries] is the logarithm of the sum of each row's exponentials.
extern "C" void attention_forward_float(const Heads *shape, const float *query, const float *key, const float *value,
                                        const uint8_t *mask, float *out, float *level, int threads) {
    const Heads s = *shape;
    const int64_t row = apart(s.keys), width = padded(s.width);
    const float by = 1.0f / std::sqrt(float(s.width));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t each = 0; each < s.batch * s.heads; each++) {
        const int64_t b = each / s.heads, h = each % s.heads;
        Room room(padded(s.keys) * s.width + s.keys * width + QUERIES * (row + width));
        float *keyed = room.take<float>(padded(s.keys) * s.width), *valued = room.take<float>(s.keys * width);
        float *scores = room.take<float>(QUERIES * row), *found = room.take<float>(QUERIES * width);
        across_rows(key + begin(s.key, b, h), s.key.row, s.keys, s.width, keyed);
        along_rows(value + begin(s.value, b, h), s.value.row, s.keys, s.width, valued);
        for (int64_t q = 0; q < s.queries; q += QUERIES) {
            const int64_t rows = std::min(QUERIES, s.queries - q);
            times(rows, s.width, padded(s.keys), query + begin(s.query, b, h) + q * s.query.row, s.query.row, keyed,
                  nullptr, scores, row);
            hide(s, masked(s, mask, b, h, q), rows, row, scores);
            float factor[QUERIES];
            for (int64_t i = 0; i < rows; i++) {
                float *line = scores + i * row, most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
                for (int64_t j = 0; j < s.keys; j++) most = line[j] > most ? line[j] : most;
                const float top = by * most;
#pragma omp simd reduction(+ : sum)
                for (int64_t j = 0; j < s.keys; j++) sum += line[j] = share_of(line[j], by, top);
                factor[i] = 1.0f / sum;
                level[each * s.queries + q + i] = top + std::log(sum);
            }
            times(rows, s.keys, width, scores, row, valued, nullptr, found, width);
            float *to = out + begin(s.out, b, h) + q * s.out.row;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t j = 0; j < s.width; j++) to[i * s.out.row + j] = found[i * width + j] * factor[i];
        }
    }
}

// The gradients of query, key and value from that of the output.
extern "C" void attention_backward_float(const Heads *shape, const float *query, const float *key, const float *value,
                                         const uint8_t *mask, const float *level, const float *of_out,
                                         float *of_query, float *of_key, float *of_value, int threads) {
    const Heads s = *shape;
    const int64_t row = apart(s.keys), width = padded(s.width), packed = padded(s.keys) * width;
    const float by = 1.0f / std::sqrt(float(s.width));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t each = 0; each < s.batch * s.heads; each++) {
        const int64_t b = each / s.heads, h = each % s.heads;
        Room room(5 * packed + QUERIES * (2 * row + 3 * width));
        float *keyed = room.take<float>(packed), *valued = room.take<float>(packed);
        float *key_rows = room.take<float>(packed);
        float *key_sum = room.take<float>(packed), *value_sum = room.take<float>(packed);
        float *shares = room.take<float>(QUERIES * row), *slopes = room.take<float>(QUERIES * row);
        float *asked = room.take<float>(QUERIES * width), *up = room.take<float>(QUERIES * width);
        float *made = room.take<float>(QUERIES * width);
        across_rows(key + begin(s.key, b, h), s.key.row, s.keys, s.width, keyed);
        across_rows(value + begin(s.value, b, h), s.value.row, s.keys, s.width, valued);
        along_rows(key + begin(s.key, b, h), s.key.row, s.keys, s.width, key_rows);
        for (int64_t q = 0; q < s.queries; q += QUERIES) {
            const int64_t rows = std::min(QUERIES, s.queries - q);
            copy_rows(query + begin(s.query, b, h) + q * s.query.row, s.query.row, rows, s.width, width, asked);
            copy_rows(of_out + begin(s.out, b, h) + q * s.out.row, s.out.row, rows, s.width, width, up);
            times(rows, s.width, padded(s.keys), asked, width, keyed, nullptr, shares, row);
            times(rows, s.width, padded(s.keys), up, width, valued, nullptr, slopes, row);
            hide(s, masked(s, mask, b, h, q), rows, row, shares);
            for (int64_t i = 0; i < rows; i++) {
                float *share = shares + i * row, *slope = slopes + i * row, mean = 0.0f;
                const float top = level[each * s.queries + q + i];
#pragma omp simd reduction(+ : mean)
                for (int64_t j = 0; j < s.keys; j++) {
                    share[j] = share_of(share[j], by, top);
                    mean += share[j] * slope[j];
                }
#pragma omp simd
                for (int64_t j = 0; j < s.keys; j++) slope[j] = by * share[j] * (slope[j] - mean);
            }
            times(rows, s.keys, width, slopes, row, key_rows, nullptr, made, width);
            float *to = of_query + begin(s.query, b, h) + q * s.query.row;
            for (int64_t i = 0; i < rows; i++)
                std::memcpy(to + i * s.query.row, made + i * width, s.width * sizeof(float));
            sum_products(rows, s.keys, width, slopes, row, asked, key_sum, q > 0);
            sum_products(rows, s.keys, width, shares, row, up, value_sum, q > 0);
        }
        float *to_key = of_key + begin(s.key, b, h), *to_value = of_value + begin(s.value, b, h);
        for (int64_t i = 0; i < s.keys; i++) {
            std::memcpy(to_key + i * s.key.row, key_sum + i * width, s.width * sizeof(float));
            std::memcpy(to_value + i * s.value.row, value_sum + i * width, s.width * sizeof(float));
        }
    }
}
