// Attention and its gradients in bfloat16, a few queries at a time, so that no score leaves the cache.
//
// What a row of scores needs stays in the cache between two products of matrices, as in Dao et al. 2022
// (arXiv:2205.14135); all keys of a head are there at once, so that a softmax needs no second look. Products
// multiply pairs of bfloat16 and add in float; softmax and its gradient are in float. Compiled by
// models/kernels.py where the processor has AVX512-BF16; called from models/attention.py.

#ifdef __AVX512BF16__

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "heads.h"

typedef uint16_t Half;  // the bits of a bfloat16
typedef uint32_t Pair;  // two of them, the first in the low half

constexpr int64_t LANES = 16, COLUMNS = 2 * LANES;  // of a register, and of a tile of a product
constexpr int64_t QUERIES = 32;                     // at a time

INLINE int64_t rounded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
INLINE Pair pair(Half low, Half high) { return Pair(low) | Pair(high) << 16; }
INLINE __m256i halves(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
INLINE void store_pairs(Pair *to, const __m512i (&both)[2]) {
    _mm512_storeu_si512(to, _mm512_or_si512(both[0], _mm512_slli_epi32(both[1], 16)));
}

// ROWS rows of c [ROWS, COLUMNS] from `pairs` pairs of each row of a and column of b.
template <int ROWS>
INLINE void tile(int64_t pairs, const Pair *a, int64_t a_row, int64_t a_pair, const Pair *b, int64_t b_pair,
                 float *c, int64_t c_row, bool add) {
    __m512 sum[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < 2; n++)
            sum[r][n] = add ? _mm512_loadu_ps(c + r * c_row + n * LANES) : _mm512_setzero_ps();
    for (int64_t p = 0; p < pairs; p++) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(b + p * b_pair);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(b + p * b_pair + LANES);
        for (int r = 0; r < ROWS; r++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(int(a[r * a_row + p * a_pair]));
            sum[r][0] = _mm512_dpbf16_ps(sum[r][0], both, left);
            sum[r][1] = _mm512_dpbf16_ps(sum[r][1], both, right);
        }
    }
    for (int r = 0; r < ROWS; r++)
        for (int n = 0; n < 2; n++) _mm512_storeu_ps(c + r * c_row + n * LANES, sum[r][n]);
}

// c [rows columns] = (c +) a b: a pair of a is a[i * a_row + p * a_pair], b [pairs columns] is of pairs of
// rows. Rows are a multiple of 8 and columns of COLUMNS.
INLINE void product(int64_t rows, int64_t columns, int64_t pairs, const Pair *a, int64_t a_row,
                    int64_t a_pair, const Pair *b, float *c, bool add = false) {
    for (int64_t j = 0; j < columns; j += COLUMNS)
        for (int64_t i = 0; i < rows; i += 8)
            tile<8>(pairs, a + i * a_row, a_row, a_pair, b + j, columns, c + i * columns + j, columns, add);
}

// Rows [rows width] as pairs along the width: [padded wide / 2], zeros beyond both.
static void along_width(const Half *from, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                        int64_t wide, Pair *to) {
    std::memset(to, 0, padded * wide / 2 * sizeof(Pair));
    for (int64_t i = 0; i < rows; i++)
        std::memcpy(to + i * wide / 2, from + i * stride, width * sizeof(Half));
}

// The same transposed: [wide / 2 padded].
static void across_width(const Half *from, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                         int64_t wide, Pair *to) {
    std::memset(to, 0, padded * wide / 2 * sizeof(Pair));
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j += 2)
            to[j / 2 * padded + i] = pair(from[i * stride + j], j + 1 < width ? from[i * stride + j + 1] : 0);
}

// Pairs of rows: [padded / 2 wide].
static void along_rows(const Half *from, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                       int64_t wide, Pair *to) {
    std::memset(to, 0, padded * wide / 2 * sizeof(Pair));
    for (int64_t i = 0; i < rows; i += 2) {
        const Half *one = from + i * stride, *next = one + stride;
        Pair *row = to + i / 2 * wide;
        if (i + 1 < rows)
            for (int64_t j = 0; j < width; j++) row[j] = pair(one[j], next[j]);
        else
            for (int64_t j = 0; j < width; j++) row[j] = pair(one[j], 0);
    }
}

// As bfloat16, times `factor`.
INLINE void write(const float *from, int64_t rows, int64_t width, int64_t wide, float factor, Half *to,
                  int64_t stride) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < width; j += LANES) {
            const __mmask16 there = __mmask16((1u << std::min(LANES, width - j)) - 1u);
            const __m512 values = _mm512_mul_ps(_mm512_set1_ps(factor), _mm512_loadu_ps(from + i * wide + j));
            _mm256_mask_storeu_epi16(to + i * stride + j, there, halves(values));
        }
}

// 2^x to 3e-6, 0 below 2^-126; what is not a number stays none.
INLINE __m512 power_of_two(__m512 x) {
    const __m512 least = _mm512_set1_ps(-126.0f);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 p = _mm512_set1_ps(9.5701013e-3f);  // a minimax fit on [-1/2, 1/2]
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(5.5917859e-2f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(2.4024744e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(6.9312179e-1f));
    p = _mm512_fmadd_ps(p, rest, _mm512_set1_ps(9.9999928e-1f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), p, whole);
}

constexpr float LOG2E = 1.44269504f;

// `level` [batch heads queries] is the logarithm to the base 2 of the sum of each row's exponentials.
extern "C" void attention_forward_bfloat16(const Heads *shape, const Half *query, const Half *key, const Half *value,
                                           const uint8_t *mask, Half *out, float *level, int threads) {
    const Heads s = *shape;
    const int64_t keys = rounded(s.keys, COLUMNS), wide = rounded(s.width, COLUMNS), packed = keys * wide / 2;
    const __m512 by = _mm512_set1_ps(LOG2E / std::sqrt(float(s.width)));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t each = 0; each < s.batch * s.heads; each++) {
        const int64_t b = each / s.heads, h = each % s.heads;
        Room room(2 * packed + QUERIES * (wide / 2 + keys / 2 + keys + wide));
        Pair *keyed = room.take<Pair>(packed), *valued = room.take<Pair>(packed);
        Pair *asked = room.take<Pair>(QUERIES * wide / 2);
        Half *shares = room.take<Half>(QUERIES * keys / 2);
        float *scores = room.take<float>(QUERIES * keys), *found = room.take<float>(QUERIES * wide);
        across_width(key + begin(s.key, b, h), s.key.row, s.keys, s.width, keys, wide, keyed);
        along_rows(value + begin(s.value, b, h), s.value.row, s.keys, s.width, keys, wide, valued);
        for (int64_t q = 0; q < s.queries; q += QUERIES) {
            const int64_t rows = std::min(QUERIES, s.queries - q), padded = rounded(rows, 8);
            const Half *from = query + begin(s.query, b, h) + q * s.query.row;
            along_width(from, s.query.row, rows, s.width, padded, wide, asked);
            product(padded, keys, wide / 2, asked, wide / 2, 1, keyed, scores);
            hide(s, masked(s, mask, b, h, q), rows, keys, scores);
            float sums[QUERIES];
            for (int64_t i = 0; i < rows; i++) {
                const float *row = scores + i * keys;
                __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
                for (int64_t j = 0; j < keys; j += LANES)
                    most = _mm512_max_ps(most, _mm512_loadu_ps(row + j));
                const __m512 top = _mm512_mul_ps(by, _mm512_set1_ps(_mm512_reduce_max_ps(most)));
                for (int64_t j = 0; j < keys; j += LANES) {
                    const __m512 share = power_of_two(_mm512_fmsub_ps(by, _mm512_loadu_ps(row + j), top));
                    sum = _mm512_add_ps(sum, share);
                    _mm256_storeu_si256((__m256i *)(shares + i * keys + j), halves(share));
                }
                sums[i] = _mm512_reduce_add_ps(sum);
                level[each * s.queries + q + i] = _mm512_cvtss_f32(top) + std::log2(sums[i]);
            }
            product(padded, wide, keys / 2, (const Pair *)shares, keys / 2, 1, valued, found);
            for (int64_t i = 0; i < rows; i++)
                write(found + i * wide, 1, s.width, wide, 1.0f / sums[i],
                      out + begin(s.out, b, h) + (q + i) * s.out.row, s.out.row);
        }
    }
}

// The gradients of query, key and value from that of the output.
extern "C" void attention_backward_bfloat16(const Heads *shape, const Half *query, const Half *key, const Half *value,
                                            const uint8_t *mask, const float *level, const Half *of_out,
                                            Half *of_query, Half *of_key, Half *of_value, int threads) {
    const Heads s = *shape;
    const int64_t keys = rounded(s.keys, COLUMNS), wide = rounded(s.width, COLUMNS), packed = keys * wide / 2;
    const float scale = 1.0f / std::sqrt(float(s.width));
    const __m512 by = _mm512_set1_ps(LOG2E * scale);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t each = 0; each < s.batch * s.heads; each++) {
        const int64_t b = each / s.heads, h = each % s.heads;
        const int64_t few = QUERIES * wide / 2, half = QUERIES * keys / 2;
        Room room(7 * packed + 6 * few + 7 * half);
        Pair *keyed = room.take<Pair>(packed), *valued = room.take<Pair>(packed);
        Pair *key_rows = room.take<Pair>(packed);
        Pair *asked = room.take<Pair>(few), *asked_rows = room.take<Pair>(few);
        Pair *up = room.take<Pair>(few), *up_rows = room.take<Pair>(few);
        Pair *shares = room.take<Pair>(half), *slopes = room.take<Pair>(half);
        Half *slope_rows = room.take<Half>(half);
        float *scores = room.take<float>(2 * half), *of_shares = room.take<float>(2 * half);
        float *made = room.take<float>(2 * few);
        float *key_sum = room.take<float>(2 * packed), *value_sum = room.take<float>(2 * packed);
        across_width(key + begin(s.key, b, h), s.key.row, s.keys, s.width, keys, wide, keyed);
        across_width(value + begin(s.value, b, h), s.value.row, s.keys, s.width, keys, wide, valued);
        along_rows(key + begin(s.key, b, h), s.key.row, s.keys, s.width, keys, wide, key_rows);
        for (int64_t q = 0; q < s.queries; q += QUERIES) {
            const int64_t rows = std::min(QUERIES, s.queries - q), padded = rounded(rows, 8);
            const Half *from = query + begin(s.query, b, h) + q * s.query.row;
            const Half *grown = of_out + begin(s.out, b, h) + q * s.out.row;
            along_width(from, s.query.row, rows, s.width, padded, wide, asked);
            along_rows(from, s.query.row, rows, s.width, padded, wide, asked_rows);
            along_width(grown, s.out.row, rows, s.width, padded, wide, up);
            along_rows(grown, s.out.row, rows, s.width, padded, wide, up_rows);
            product(padded, keys, wide / 2, asked, wide / 2, 1, keyed, scores);
            product(padded, keys, wide / 2, up, wide / 2, 1, valued, of_shares);
            hide(s, masked(s, mask, b, h, q), rows, keys, scores);
            for (int64_t i = 0; i < padded; i += 2) {  // two rows, as they make pairs
                float *row = scores + i * keys;
                const float *of_row = of_shares + i * keys;
                __m512 mean[2];
                for (int r = 0; r < 2; r++) {
                    // A row that is only there to make the number even has no share in anything.
                    const bool there = i + r < rows;
                    const __m512 top = _mm512_set1_ps(there ? level[each * s.queries + q + i + r] : INFINITY);
                    __m512 sum = _mm512_setzero_ps();
                    for (int64_t j = r * keys; j < (r + 1) * keys; j += LANES) {
                        const __m512 share = power_of_two(_mm512_fmsub_ps(by, _mm512_loadu_ps(row + j), top));
                        sum = _mm512_fmadd_ps(share, _mm512_loadu_ps(of_row + j), sum);
                        _mm512_storeu_ps(row + j, share);
                    }
                    mean[r] = _mm512_set1_ps(_mm512_reduce_add_ps(sum));
                }
                for (int64_t j = 0; j < keys; j += LANES) {
                    __m512i share[2], slope[2];
                    for (int r = 0; r < 2; r++) {
                        const __m512 part = _mm512_loadu_ps(row + r * keys + j);
                        const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(of_row + r * keys + j), mean[r]);
                        const __m512 exact = _mm512_mul_ps(_mm512_mul_ps(part, off), _mm512_set1_ps(scale));
                        const __m256i short_one = halves(exact);
                        _mm256_storeu_si256((__m256i *)(slope_rows + (i + r) * keys + j), short_one);
                        slope[r] = _mm512_cvtepu16_epi32(short_one);
                        share[r] = _mm512_cvtepu16_epi32(halves(part));
                    }
                    store_pairs(shares + i / 2 * keys + j, share);
                    store_pairs(slopes + i / 2 * keys + j, slope);
                }
            }
            product(padded, wide, keys / 2, (const Pair *)slope_rows, keys / 2, 1, key_rows, made);
            write(made, rows, s.width, wide, 1.0f, of_query + begin(s.query, b, h) + q * s.query.row,
                  s.query.row);
            product(keys, wide, padded / 2, slopes, 1, keys, asked_rows, key_sum, q > 0);
            product(keys, wide, padded / 2, shares, 1, keys, up_rows, value_sum, q > 0);
        }
        write(key_sum, s.keys, s.width, wide, 1.0f, of_key + begin(s.key, b, h), s.key.row);
        write(value_sum, s.keys, s.width, wide, 1.0f, of_value + begin(s.value, b, h), s.value.row);
    }
}

#endif
