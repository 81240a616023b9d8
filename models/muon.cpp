// A step of Muon for small matrices in float32, each by one thread: models/stages/muon.py, which has the mathematics.
//
// Most of it is products of symmetric matrices that commute, as all are polynomials of one. Such a product is symmetric,
// so that half of it is computed and the other half is that half again. Rows and columns that are missing to whole
// registers are zeros, which change no singular value.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "product.h"

// Columns (of a wide matrix) or rows whose products are added at once: what a cache next to a thread holds.
constexpr int64_t TOGETHER = 256;
constexpr int POLYNOMIALS = 3;

struct Matrix {
    int64_t rows, columns;  // of all three, dense
    const float *gradient;
    float *mean, *weight;

    static int64_t whole(int64_t numbers) { return (numbers + LANES - 1) / LANES * LANES; }
    int64_t height() const { return whole(rows); }
    int64_t width() const { return whole(columns); }
    int64_t size() const { return height() * width(); }
    bool is_wide() const { return rows <= columns; }
    int64_t side() const { return std::min(height(), width()); }
    int64_t room() const { return 2 * size() + side() * (4 * side() + TOGETHER); }
};

struct Rule {
    float momentum;  // of the mean gradient
    float left;      // of the weight
    float by;        // the update's root mean square, times the root of what that of an orthogonal matrix is by
    float polynomials[POLYNOMIALS][3];
};

// The half above the diagonal of c [side side] from the half below.
static void mirror(int64_t side, float *c) {
    for (int64_t i = LANES; i < side; i += LANES)
        for (int64_t j = 0; j < i; j += LANES) transpose(c + i * side + j, side, c + j * side + i, side);
}

// c = a b, of which all three are symmetric [side side].
static void symmetric_product(int64_t side, const float *a, const float *b, float *c) {
    for (int64_t j = 0; j < side; j += PANEL)
        product(side - j, wide(side, j), side, a + j * side, side, 1, b + j, side, c + j * side + j, side, nullptr, 0);
    mirror(side, c);
}

// f = a + b gram + c gram^2: what a polynomial multiplies a matrix of that Gram matrix by.
static void factor(int64_t side, const float *gram, const float (&of)[3], float *f) {
    symmetric_product(side, gram, gram, f);
    for (int64_t i = 0; i < side * side; i++) f[i] = of[2] * f[i] + of[1] * gram[i];
    for (int64_t i = 0; i < side; i++) f[i * (side + 1)] += of[0];
}

// The mean gradient moves towards the gradient, and x [height width] is Nesterov's direction.
static void direct(const Matrix &of, const Rule &rule, float *x) {
    const float share = 1.0f - rule.momentum;
    if (of.size() > of.rows * of.columns) std::fill(x, x + of.size(), 0.0f);
    for (int64_t i = 0; i < of.rows; i++) {
        const float *gradients = of.gradient + i * of.columns;
        float *means = of.mean + i * of.columns, *to = x + i * of.width();
        for (int64_t j = 0; j < of.columns; j++) {
            const float gradient = gradients[j], mean = means[j] + share * (gradient - means[j]);
            means[j] = mean;
            to[j] = mean + share * (gradient - mean);
        }
    }
}

// gram [side side] = x x^T of a wide x, x^T x of another; `room` [TOGETHER side].
static void gram_matrix(const Matrix &of, const float *x, float *gram, float *room) {
    const int64_t side = of.side(), depth = std::max(of.height(), of.width());
    for (int64_t first = 0; first < depth; first += TOGETHER) {
        const int64_t now = std::min(TOGETHER, depth - first);
        const float *a = x + first, *b = room;
        int64_t row = of.width(), step = 1;
        if (of.is_wide())
            for (int64_t d = 0; d < now; d += LANES)
                for (int64_t i = 0; i < side; i += LANES) transpose(a + i * row + d, row, room + d * side + i, side);
        else a = b = x + first * side, row = 1, step = side;
        for (int64_t j = 0; j < side; j += PANEL) {
            float *c = gram + j * side + j;
            product(side - j, wide(side, j), now, a + j * row, row, step, b + j, side, c, side, first ? c : nullptr,
                    side);
        }
    }
    mirror(side, gram);
}

static void step(const Matrix &of, const Rule &rule, float *room) {
    const int64_t side = of.side(), square = side * side;
    float *x = room, *update = x + of.size(), *gram = update + of.size();
    float *f = gram + square, *all = f + square, *other = all + square;
    direct(of, rule, x);
    gram_matrix(of, x, gram, other + square);
    float trace = 0.0f;
    for (int64_t i = 0; i < side; i++) trace += gram[i * (side + 1)];
    // The trace is the sum of the squared singular values, so none is above 1 then.
    const float scale = 1.0f / std::max(trace, std::numeric_limits<float>::min());
    for (int64_t i = 0; i < square; i++) gram[i] *= scale;
    factor(side, gram, rule.polynomials[0], f);
    std::copy(f, f + square, all);
    for (int k = 1; k < POLYNOMIALS; k++) {
        symmetric_product(side, f, gram, other);
        symmetric_product(side, other, f, gram);
        factor(side, gram, rule.polynomials[k], f);
        symmetric_product(side, f, all, other);
        std::swap(all, other);
    }
    const float by = -rule.by * std::sqrt(scale) * std::sqrt(float(std::max(of.rows, of.columns)));
    for (int64_t i = 0; i < square; i++) all[i] *= by;
    const float *a = of.is_wide() ? all : x, *b = of.is_wide() ? x : all;
    for (int64_t j = 0; j < of.width(); j += PANEL)
        product(of.rows, wide(of.width(), j), side, a, side, 1, b + j, of.width(), update + j, of.width(), nullptr, 0);
    for (int64_t i = 0; i < of.rows; i++) {
        const float *from = update + i * of.width();
        float *weights = of.weight + i * of.columns;
        for (int64_t j = 0; j < of.columns; j++) weights[j] = rule.left * weights[j] + from[j];
    }
}

// Floats that `muon` wants for itself.
extern "C" int64_t muon_room(const Matrix *matrices, int64_t count, int threads) {
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = std::max(most, matrices[i].room());
    return most * std::min<int64_t>(threads, count);
}

// Nothing changes where `refused`, if it is no null, is not 0.
extern "C" void muon(const Matrix *matrices, int64_t count, const Rule *rule, const float *refused, float *room,
                     int threads) {
    if (refused && *refused != 0.0f) return;
    const int64_t own = muon_room(matrices, count, 1);
#pragma omp parallel for num_threads(std::min<int64_t>(threads, count)) if (threads > 1) schedule(dynamic)
    for (int64_t i = 0; i < count; i++) step(matrices[i], *rule, room + omp_get_thread_num() * own);
}
