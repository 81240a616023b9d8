// The feed-forward of a transformer in float32 and its gradients, some rows at a time: models/feed_forward.py.
//
// y = gate(x expand^T + wide) contract^T + narrow, gate being GEGLU. What lies between the two products is 12 times
// as large as x; of some rows it stays in the cache next to a thread, and the backward pass makes it again. Rows are dense,
// widths multiples of 16. The weights are packed, in each call, into panels as wide as the registers of a product.

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "numbers.h"
#include "product.h"

// Rows at a time.
constexpr int64_t TOGETHER = 60;
// Rows whose gradients are added up on their own, before those sums are; and such slices at most.
constexpr int64_t SLICE = 128, MOST_SLICES = 8;

struct FeedForward {
    int64_t rows, width, inside;  // x and y [rows width], expand [2 inside, width], contract [width inside]

    int64_t weights() const { return 3 * inside * width; }
    int64_t sums() const { return weights() + 2 * inside + width; }  // gradients of all weights and biases
    int64_t between() const { return TOGETHER * 4 * inside; }        // of some rows: both halves, gate, its gradient
    int64_t slices() const { return std::clamp<int64_t>(rows / SLICE, 1, MOST_SLICES); }
};

// Weights [columns depth] for rows times weights^T: panels [columns/PANEL depth PANEL].
static void pack_transposed(int64_t depth, int64_t columns, const float *weight, float *panels) {
#pragma omp for
    for (int64_t c = 0; c < columns; c += PANEL)
        for (int64_t j = 0; j < wide(columns, c); j += LANES)
            for (int64_t d = 0; d < depth; d += LANES)
                transpose(weight + (c + j) * depth + d, depth, panels + c * depth + d * wide(columns, c) + j,
                          wide(columns, c));
}

// Weights [depth columns] for rows times weights: the same panels.
static void pack(int64_t depth, int64_t columns, const float *weight, float *panels) {
#pragma omp for
    for (int64_t c = 0; c < columns; c += PANEL)
        for (int64_t d = 0; d < depth; d++)
            for (int64_t j = 0; j < wide(columns, c); j += LANES)
                store(panels + c * depth + d * wide(columns, c) + j, load(weight + d * columns + c + j));
}

static void sum_rows(int64_t rows, int64_t columns, const float *a, float *sum, bool add) {
    for (int64_t j = 0; j < columns; j += LANES) {
        Lanes some = add ? load(sum + j) : Lanes{};
        for (int64_t i = 0; i < rows; i++) some += load(a + i * columns + j);
        store(sum + j, some);
    }
}

// Floats that the functions below want for themselves.
extern "C" int64_t feed_forward_room(const FeedForward *shape, int threads) {
    return shape->weights() + threads * shape->between();
}

extern "C" int64_t feed_forward_gradient_room(const FeedForward *shape, int threads) {
    const FeedForward &s = *shape;
    return s.weights() + 2 * s.inside * s.width + s.slices() * s.sums() + threads * s.between();
}

extern "C" void feed_forward(const FeedForward *shape, const float *x, const float *expand, const float *wide_bias,
                             const float *contract, const float *bias, float *y, float *room, int threads) {
    const FeedForward s = *shape;
    const int64_t D = s.width, F = s.inside;
    float *expanding = room, *contracting = expanding + 2 * F * D, *rest = room + s.weights();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *both = rest + omp_get_thread_num() * s.between(), *gated = both + TOGETHER * 2 * F;
        pack_transposed(D, 2 * F, expand, expanding);
        pack_transposed(F, D, contract, contracting);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < s.rows; first += TOGETHER) {
            const int64_t rows = std::min(TOGETHER, s.rows - first);
            times(rows, D, 2 * F, x + first * D, D, expanding, wide_bias, both, 2 * F);
            for (int64_t i = 0; i < rows; i++) gate(F, both + 2 * i * F, gated + i * F);
            times(rows, F, D, gated, F, contracting, bias, y + first * D, D);
        }
    }
}

// `found` is the gradients of expand, contract and both biases, one behind the other.
extern "C" void feed_forward_gradient(const FeedForward *shape, const float *x, const float *expand,
                                      const float *wide_bias, const float *contract, const float *of_y, float *of_x,
                                      float *found, float *room, int threads) {
    const FeedForward s = *shape;
    const int64_t D = s.width, F = s.inside, slices = s.slices();
    float *expanding = room, *expanded = expanding + 2 * F * D, *contracted = expanded + 2 * F * D;
    float *sums = room + s.weights() + 2 * F * D, *rest = sums + slices * s.sums();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *both = rest + omp_get_thread_num() * s.between(), *gated = both + TOGETHER * 2 * F;
        float *of_gated = gated + TOGETHER * F;
        pack_transposed(D, 2 * F, expand, expanding);
        pack(2 * F, D, expand, expanded);
        pack(D, F, contract, contracted);
#pragma omp for schedule(dynamic)
        for (int64_t slice = 0; slice < slices; slice++) {
            float *of_expand = sums + slice * s.sums(), *of_contract = of_expand + 2 * F * D;
            float *of_wide = of_expand + s.weights(), *of_bias = of_wide + 2 * F;
            const int64_t begin = slice * s.rows / slices, end = (slice + 1) * s.rows / slices;
            for (int64_t first = begin; first < end; first += TOGETHER) {
                const int64_t rows = std::min(TOGETHER, end - first);
                const float *in = x + first * D, *up = of_y + first * D;
                times(rows, D, 2 * F, in, D, expanding, wide_bias, both, 2 * F);
                times(rows, D, F, up, D, contracted, nullptr, of_gated, F);
                for (int64_t i = 0; i < rows; i++)
                    of_gate(F, both + 2 * i * F, of_gated + i * F, both + 2 * i * F, gated + i * F);
                times(rows, 2 * F, D, both, 2 * F, expanded, nullptr, of_x + first * D, D);
                sum_products(rows, D, F, up, D, gated, of_contract, first > begin);
                sum_products(rows, 2 * F, D, both, 2 * F, in, of_expand, first > begin);
                sum_rows(rows, 2 * F, both, of_wide, first > begin);
                sum_rows(rows, D, up, of_bias, first > begin);
            }
        }
#pragma omp for
        for (int64_t i = 0; i < s.sums(); i++) {
            float sum = 0.0f;
            for (int64_t slice = 0; slice < slices; slice++) sum += sums[slice * s.sums() + i];
            found[i] = sum;
        }
    }
}
