// 3x3 convolutions by tiles of 4x4 outputs and 6x6 inputs, and the gradients of their kernels: models/winograd.py.
//
// The interpolation points are 0, +-A, +-B and infinity (Lavin and Gray 2016, arXiv:1509.09308; for A = 3/4
// and B = 3/2 errors are a fifth of those of 1 and 2: Barabasz et al. 2020, arXiv:1803.10986, on the choice).
// Maps are [samples height width channels], height and width multiples of 4, channels of 16; outside of a map
// there are zeros. A transformed map or kernel is 36 planes. Each thread takes a few tiles through both transforms
// and the products between them, which stay in its cache: what a thread waits for is all that threads cost.

#include <omp.h>

#include "product.h"

constexpr float A = 0.75f, B = 1.5f, AA = A * A, BB = B * B, SUM = AA + BB, ALL = AA * BB;
// One over the product of a point's distances to the others, but for infinity: of 0, +-A and +-B.
constexpr float AT_0 = 1 / ALL, AT_A = 1 / (2 * AA * (AA - BB)), AT_B = 1 / (2 * BB * (BB - AA));

// Floats between planes: at powers of two apart they would fall on the same lines of a cache.
constexpr int64_t APART = 48;
// Floats of a thread's transformed tiles, of both maps, that its own cache holds; and of those of all threads.
constexpr int64_t NEAR = 128 * 1024, SHARED = 256 * 1024;

struct Convolution {
    int64_t samples, height, width, within, out;

    int64_t tiles() const { return samples * (height / 4) * (width / 4); }
    int64_t kernel_plane() const { return within * out + APART; }
};

// One line each: 3 numbers of a kernel to 6, 6 inputs to 6 products' factors, and 6 products to 4 outputs; then the
// transposed.
static inline void of_kernel(const Lanes *g, Lanes *u) {
    Lanes even = AT_A * (g[0] + AA * g[2]), odd = AT_A * A * g[1];
    u[1] = even + odd;
    u[2] = even - odd;
    even = AT_B * (g[0] + BB * g[2]);
    odd = AT_B * B * g[1];
    u[3] = even + odd;
    u[4] = even - odd;
    u[0] = AT_0 * g[0];
    u[5] = g[2];
}

static inline void of_input(const Lanes *x, Lanes *v) {
    Lanes even = x[4] - BB * x[2], odd = A * (x[3] - BB * x[1]);
    v[1] = even + odd;
    v[2] = even - odd;
    even = x[4] - AA * x[2];
    odd = B * (x[3] - AA * x[1]);
    v[3] = even + odd;
    v[4] = even - odd;
    v[0] = ALL * x[0] - SUM * x[2] + x[4];
    v[5] = ALL * x[1] - SUM * x[3] + x[5];
}

static inline void of_product(const Lanes *m, Lanes *y) {
    Lanes p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
    y[0] = m[0] + p + r;
    y[1] = A * q + B * s;
    y[2] = AA * p + BB * r;
    y[3] = A * AA * q + B * BB * s + m[5];
}

static inline void of_output_gradient(const Lanes *y, Lanes *w) {
    Lanes even = y[0] + AA * y[2], odd = A * y[1] + A * AA * y[3];
    w[1] = even + odd;
    w[2] = even - odd;
    even = y[0] + BB * y[2];
    odd = B * y[1] + B * BB * y[3];
    w[3] = even + odd;
    w[4] = even - odd;
    w[0] = y[0];
    w[5] = y[3];
}

static inline void of_kernel_gradient(const Lanes *u, Lanes *g) {
    Lanes p = AT_A * (u[1] + u[2]), q = AT_A * (u[1] - u[2]), r = AT_B * (u[3] + u[4]), s = AT_B * (u[3] - u[4]);
    g[0] = AT_0 * u[0] + p + r;
    g[1] = A * q + B * s;
    g[2] = AA * p + BB * r + u[5];
}

// All lines of a tile, then all columns of what comes of them.
template <int FROM, int TO, class F>
static inline void both(Lanes (&tile)[FROM][FROM], Lanes (&out)[TO][TO], F line) {
    Lanes half[TO][FROM];
    for (int i = 0; i < FROM; i++) {
        Lanes made[TO];
        line(tile[i], made);
        for (int j = 0; j < TO; j++) half[j][i] = made[j];
    }
    for (int j = 0; j < TO; j++) {
        Lanes made[TO];
        line(half[j], made);
        for (int i = 0; i < TO; i++) out[i][j] = made[i];
    }
}

// The corner (sample, y, x) of a tile, and the 6x6 numbers around its 4x4 in `C` channels from `c` on.
struct Tile {
    int64_t b, y, x;

    Tile(const Convolution &shape, int64_t tile) {
        const int64_t down = shape.height / 4, across = shape.width / 4;
        b = tile / (down * across), y = 4 * (tile / across % down), x = 4 * (tile % across);
    }
};

static inline void read_around(const Convolution &shape, Tile tile, const float *x, int64_t C, int64_t c,
                               Lanes (&in)[6][6]) {
    const int64_t H = shape.height, W = shape.width;
    for (int64_t i = 0; i < 6; i++)
        for (int64_t j = 0; j < 6; j++) {
            const int64_t y = tile.y + i - 1, z = tile.x + j - 1;
            const bool inside = y >= 0 && y < H && z >= 0 && z < W;
            in[i][j] = inside ? load(x + ((tile.b * H + y) * W + z) * C + c) : Lanes{};
        }
}

static inline float *place(const Convolution &shape, Tile tile, float *y, int64_t C, int64_t i, int64_t j) {
    return y + ((tile.b * shape.height + tile.y + i) * shape.width + tile.x + j) * C;
}

// Factors of tile `row` of some: one more position around each tile.
static void factors_of(const Convolution &shape, Tile tile, const float *x, int64_t C, float *factors, int64_t row,
                       int64_t plane) {
    for (int64_t c = 0; c < C; c += LANES) {
        Lanes in[6][6], made[6][6];
        read_around(shape, tile, x, C, c, in);
        both<6, 6>(in, made, of_input);
        for (int k = 0; k < 36; k++) store(factors + k * plane + row * C + c, made[k / 6][k % 6]);
    }
}

// Outputs of a tile from its products, plus the bias of each channel.
static void outputs_of(const Convolution &shape, Tile tile, const float *products, int64_t row, int64_t plane,
                       const float *bias, int64_t C, float *y) {
    for (int64_t c = 0; c < C; c += LANES) {
        Lanes in[6][6], made[4][4];
        for (int k = 0; k < 36; k++) in[k / 6][k % 6] = load(products + k * plane + row * C + c);
        both<6, 4>(in, made, of_product);
        const Lanes add = bias ? load(bias + c) : Lanes{};
        for (int64_t i = 0; i < 4; i++)
            for (int64_t j = 0; j < 4; j++) store(place(shape, tile, y, C, i, j) + c, made[i][j] + add);
    }
}

// Gradients of a tile's products from those of its outputs.
static void of_products_of(const Convolution &shape, Tile tile, const float *of_y, int64_t C, float *of_products,
                           int64_t row, int64_t plane) {
    for (int64_t c = 0; c < C; c += LANES) {
        Lanes in[4][4], made[6][6];
        for (int64_t i = 0; i < 4; i++)
            for (int64_t j = 0; j < 4; j++)
                in[i][j] = load(place(shape, tile, const_cast<float *>(of_y), C, i, j) + c);
        both<4, 6>(in, made, of_output_gradient);
        for (int k = 0; k < 36; k++) store(of_products + k * plane + row * C + c, made[k / 6][k % 6]);
    }
}

// Kernels [out 3 3 within] to factors [36 out/PANEL within PANEL] of products with maps of `within` channels, for LANES
// outputs from `o` on.
static void panels(const Convolution &shape, const float *kernel, int64_t o, float *factors) {
    const int64_t C = shape.within, wide = std::min(PANEL, shape.out - o / PANEL * PANEL);
    float *to = factors + o / PANEL * PANEL * C + o % PANEL;
    for (int64_t c = 0; c < C; c += LANES) {
        Lanes taps[9][LANES];
        for (int k = 0; k < 9; k++) {
            for (int64_t r = 0; r < LANES; r++) taps[k][r] = load(kernel + (9 * (o + r) + k) * C + c);
            transpose(taps[k]);
        }
        for (int64_t r = 0; r < LANES; r++) {
            Lanes in[3][3], made[6][6];
            for (int k = 0; k < 9; k++) in[k / 3][k % 3] = taps[k][r];
            both<3, 6>(in, made, of_kernel);
            for (int k = 0; k < 36; k++) store(to + k * shape.kernel_plane() + (c + r) * wide, made[k / 6][k % 6]);
        }
    }
}

// The same for the convolution that takes gradients of outputs to those of inputs: kernels [within 3 3 out], turned.
static void turned_panels(const Convolution &shape, const float *kernel, int64_t o, float *factors) {
    const int64_t wide = std::min(PANEL, shape.out - o / PANEL * PANEL);
    float *to = factors + o / PANEL * PANEL * shape.within + o % PANEL;
    for (int64_t c = 0; c < shape.within; c++) {
        Lanes in[3][3], made[6][6];
        for (int k = 0; k < 9; k++) in[k / 3][k % 3] = load(kernel + (9 * c + 8 - k) * shape.out + o);
        both<3, 6>(in, made, of_kernel);
        for (int k = 0; k < 36; k++) store(to + k * shape.kernel_plane() + c * wide, made[k / 6][k % 6]);
    }
}

// Tiles that a thread takes at a time; no output depends on how many.
static int64_t tiles_at_once(const Convolution &shape, int threads) {
    const int64_t most = std::max<int64_t>(NEAR / (36 * (shape.within + shape.out)) / ROWS, 2) * ROWS;
    return std::min(most, (shape.tiles() + threads - 1) / threads);
}

// Tiles whose gradients are added to that of the kernel at a time.
static int64_t tiles_together(const Convolution &shape) {
    return std::min(shape.tiles(), std::max<int64_t>(SHARED / (36 * std::max(shape.within, shape.out)), 2 * ROWS));
}

static int64_t planes(int64_t rows, int64_t columns) { return 36 * (rows * columns + APART); }

// Floats that the functions below want for themselves.
extern "C" int64_t winograd_room(const Convolution *shape, int threads) {
    const int64_t tiles = tiles_at_once(*shape, threads);
    return planes(shape->within, shape->out) + threads * (planes(tiles, shape->within) + planes(tiles, shape->out));
}

extern "C" int64_t winograd_gradient_room(const Convolution *shape) {
    const int64_t tiles = tiles_together(*shape);
    return planes(shape->within, shape->out) + planes(tiles, shape->within) + planes(tiles, shape->out);
}

// The convolution of `x` with kernels [out 3 3 within], or `turned` ones [within 3 3 out], plus a bias or none.
extern "C" void winograd_convolve(const Convolution *of, const float *x, const float *kernel, const float *bias,
                                  float *y, float *room, int turned, int threads) {
    const Convolution shape = *of;
    const int64_t C = shape.within, N = shape.out, at_once = tiles_at_once(shape, threads), all = shape.tiles();
    const int64_t plane_in = at_once * C + APART, plane_out = at_once * N + APART;
    float *rest = room + 36 * shape.kernel_plane();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        float *factors = rest + omp_get_thread_num() * 36 * (plane_in + plane_out), *products = factors + 36 * plane_in;
#pragma omp for
        for (int64_t o = 0; o < N; o += LANES)
            turned ? turned_panels(shape, kernel, o, room) : panels(shape, kernel, o, room);
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < all; first += at_once) {
            const int64_t count = std::min(at_once, all - first);
            for (int64_t t = 0; t < count; t++) factors_of(shape, Tile(shape, first + t), x, C, factors, t, plane_in);
            for (int k = 0; k < 36; k++)
                times(count, C, N, factors + k * plane_in, C, room + k * shape.kernel_plane(), nullptr,
                      products + k * plane_out, N);
            for (int64_t t = 0; t < count; t++)
                outputs_of(shape, Tile(shape, first + t), products, t, plane_out, bias, N, y);
        }
    }
}

// The gradient of kernels [out 3 3 within] from inputs and gradients of outputs.
extern "C" void winograd_kernel_gradient(const Convolution *of, const float *x, const float *of_y, float *of_kernel,
                                         float *room, int threads) {
    const Convolution shape = *of;
    const int64_t C = shape.within, N = shape.out, together = tiles_together(shape), all = shape.tiles();
    const int64_t plane_in = together * C + APART, plane_out = together * N + APART;
    float *factors = room + 36 * shape.kernel_plane(), *of_products = factors + 36 * plane_in;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        for (int64_t first = 0; first < all; first += together) {
            const int64_t count = std::min(together, all - first);
#pragma omp for
            for (int64_t t = 0; t < count; t++) {
                const Tile tile(shape, first + t);
                factors_of(shape, tile, x, C, factors, t, plane_in);
                of_products_of(shape, tile, of_y, N, of_products, t, plane_out);
            }
#pragma omp for collapse(2)
            for (int k = 0; k < 36; k++)
                for (int64_t c = 0; c < C; c += PANEL) {
                    float *sum = room + k * shape.kernel_plane() + c;
                    product(N, std::min(PANEL, C - c), count, of_products + k * plane_out, 1, N,
                            factors + k * plane_in + c, C, sum, C, first > 0 ? sum : nullptr, C);
                }
        }
#pragma omp for
        for (int64_t o = 0; o < N; o++)
            for (int64_t c = 0; c < C; c += LANES) {
                Lanes in[6][6], made[3][3];
                for (int k = 0; k < 36; k++) in[k / 6][k % 6] = load(room + k * shape.kernel_plane() + o * C + c);
                both<6, 3>(in, made, of_kernel_gradient);
                for (int k = 0; k < 9; k++) store(of_kernel + (9 * o + k) * C + c, made[k / 3][k % 3]);
            }
    }
}
