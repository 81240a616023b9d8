// Products of matrices in float32 as the registers of a processor take them: winograd.cpp, feed_forward.cpp,
// attention_float.cpp and muon.cpp.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));

// Rows of a product that are made at once, two Lanes each: as many as registers hold.
constexpr int ROWS = LANES == 16 ? 12 : 6;
constexpr int64_t PANEL = 2 * LANES;

static inline Lanes load(const float *from) {
    Lanes value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

static inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof(value)); }

// R rows of W * LANES sums each over `depth` products, a[r * a_row + d * a_step] times b[d * b_row ...], and of `plus`
// (null for nothing).
template <int R, int W>
static inline void block(int64_t depth, const float *a, int64_t a_row, int64_t a_step, const float *b, int64_t b_row,
                         float *c, int64_t c_row, const float *plus, int64_t plus_row) {
    Lanes sum[R][W] = {};
    for (int64_t d = 0; d < depth; d++) {
        Lanes factor[W];
        for (int w = 0; w < W; w++) factor[w] = load(b + d * b_row + w * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
            for (int w = 0; w < W; w++) sum[r][w] += a[r * a_row + d * a_step] * factor[w];
    }
    for (int r = 0; r < R; r++)
        for (int w = 0; w < W; w++) {
            if (plus) sum[r][w] += load(plus + r * plus_row + w * LANES);
            store(c + r * c_row + w * LANES, sum[r][w]);
        }
}

// The last rows, of which there are fewer than R + 1.
template <int R, int W, class... Given>
static inline void last(int64_t rows, Given... given) {
    if constexpr (R > 0) {
        if (rows == R) block<R, W>(given...);
        else last<R - 1, W>(rows, given...);
    }
}

// `columns` sums, PANEL or LANES of them, in each of `rows` rows.
static void product(int64_t rows, int64_t columns, int64_t depth, const float *a, int64_t a_row, int64_t a_step,
                    const float *b, int64_t b_row, float *c, int64_t c_row, const float *plus, int64_t plus_row) {
    for (; rows > 0; rows -= ROWS, a += ROWS * a_row, c += ROWS * c_row) {
        const int64_t now = std::min<int64_t>(rows, ROWS);
        if (columns == LANES) last<ROWS, 1>(now, depth, a, a_row, a_step, b, b_row, c, c_row, plus, plus_row);
        else last<ROWS, 2>(now, depth, a, a_row, a_step, b, b_row, c, c_row, plus, plus_row);
        if (plus) plus += ROWS * plus_row;
    }
}

// Columns of the panel that begins at `from`.
static inline int64_t wide(int64_t columns, int64_t from) { return std::min(PANEL, columns - from); }

// c [rows columns] = a [rows depth] times panels [columns/PANEL depth PANEL], plus a bias or none.
static inline void times(int64_t rows, int64_t depth, int64_t columns, const float *a, int64_t a_row,
                         const float *panels, const float *bias, float *c, int64_t c_row) {
    for (int64_t j = 0; j < columns; j += PANEL)
        product(rows, wide(columns, j), depth, a, a_row, 1, panels + j * depth, wide(columns, j), c + j, c_row,
                bias ? bias + j : nullptr, 0);
}

// c [across columns] = (c +) a^T b of a [rows across] and b [rows columns].
static inline void sum_products(int64_t rows, int64_t across, int64_t columns, const float *a, int64_t a_row,
                                const float *b, float *c, bool add) {
    for (int64_t j = 0; j < columns; j += PANEL)
        product(across, wide(columns, j), rows, a, 1, a_row, b + j, columns, c + j, columns, add ? c + j : nullptr,
                columns);
}

static inline void transpose(Lanes (&square)[LANES]) {
    float from[LANES][LANES], to[LANES][LANES];
    std::memcpy(from, square, sizeof(from));
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++) to[j][i] = from[i][j];
    std::memcpy(square, to, sizeof(to));
}

// LANES rows of as many numbers, transposed, from one place to another.
static inline void transpose(const float *from, int64_t from_row, float *to, int64_t to_row) {
    Lanes square[LANES];
    for (int64_t i = 0; i < LANES; i++) square[i] = load(from + i * from_row);
    transpose(square);
    for (int64_t i = 0; i < LANES; i++) store(to + i * to_row, square[i]);
}
