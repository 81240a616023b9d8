// The transforms of models/winograd.py: 3x3 convolutions by tiles of 4x4 outputs and 6x6 inputs.
//
// The interpolation points are 0, +-A, +-B and infinity (Lavin and Gray 2016, arXiv:1509.09308; for A = 3/4
// and B = 3/2 errors are a fifth of those of 1 and 2: Barabasz et al. 2020, arXiv:1803.10986, on the choice).
// Maps are [samples height width channels], transformed ones [36] planes of [tiles channels], `plane` numbers
// apart. Height and width are multiples of 4, channels of LANES; outside of the map there are zeros.

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif

typedef float Lanes __attribute__((vector_size(4 * LANES)));

constexpr float A = 0.75f, B = 1.5f, AA = A * A, BB = B * B, SUM = AA + BB, ALL = AA * BB;
// One over the product of a point's distances to the others, but for infinity: of 0, +-A and +-B.
constexpr float AT_0 = 1 / ALL, AT_A = 1 / (2 * AA * (AA - BB)), AT_B = 1 / (2 * BB * (BB - AA));

struct Map {
    int64_t samples, height, width, channels, plane;
};

static inline Lanes load(const float *from) {
    Lanes value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

static inline void store(float *to, Lanes value) { std::memcpy(to, &value, sizeof(value)); }

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

static inline void of_factor_gradient(const Lanes *v, Lanes *x) {
    Lanes p = v[1] + v[2], q = v[1] - v[2], r = v[3] + v[4], s = v[3] - v[4];
    x[0] = ALL * v[0];
    x[1] = ALL * v[5] - A * BB * q - AA * B * s;
    x[2] = -SUM * v[0] - BB * p - AA * r;
    x[3] = A * q + B * s - SUM * v[5];
    x[4] = v[0] + p + r;
    x[5] = v[5];
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

// `each(sample, y, x, tile, channel)` for every tile and group of channels; samples go to the threads.
template <class F>
static void tiles(const Map &map, int threads, F each) {
    const int64_t down = map.height / 4, across = map.width / 4;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t b = 0; b < map.samples; b++)
        for (int64_t i = 0; i < down; i++)
            for (int64_t j = 0; j < across; j++)
                for (int64_t c = 0; c < map.channels; c += LANES)
                    each(b, 4 * i, 4 * j, (b * down + i) * across + j, c);
}

// Kernels [out 3 3 in] to 36 planes of [out in], `plane` numbers apart.
extern "C" void winograd_kernel(int64_t out, int64_t within, int64_t plane, const float *kernel, float *planes,
                                int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < out; o++)
        for (int64_t c = 0; c < within; c += LANES) {
            Lanes in[3][3], made[6][6];
            for (int k = 0; k < 9; k++) in[k / 3][k % 3] = load(kernel + (9 * o + k) * within + c);
            both<3, 6>(in, made, of_kernel);
            float *to = planes + o * within + c;
            for (int k = 0; k < 36; k++) store(to + k * plane, made[k / 6][k % 6]);
        }
}

// Gradients of those planes to gradients of kernels.
extern "C" void winograd_kernel_gradient(int64_t out, int64_t within, int64_t plane, const float *of_planes,
                                         float *of_kernels, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < out; o++)
        for (int64_t c = 0; c < within; c += LANES) {
            Lanes in[6][6], made[3][3];
            const float *from = of_planes + o * within + c;
            for (int k = 0; k < 36; k++) in[k / 6][k % 6] = load(from + k * plane);
            both<6, 3>(in, made, of_kernel_gradient);
            for (int k = 0; k < 9; k++) store(of_kernels + (9 * o + k) * within + c, made[k / 3][k % 3]);
        }
}

// Inputs to factors: one more position around each tile.
extern "C" void winograd_input(const Map *map, const float *x, float *factors, int threads) {
    const int64_t H = map->height, W = map->width, C = map->channels, plane = map->plane;
    tiles(*map, threads, [=](int64_t b, int64_t y0, int64_t x0, int64_t tile, int64_t c) {
        Lanes in[6][6], out[6][6];
        for (int64_t i = 0; i < 6; i++)
            for (int64_t j = 0; j < 6; j++) {
                const int64_t y = y0 + i - 1, z = x0 + j - 1;
                const bool inside = y >= 0 && y < H && z >= 0 && z < W;
                in[i][j] = inside ? load(x + ((b * H + y) * W + z) * C + c) : Lanes{};
            }
        both<6, 6>(in, out, of_input);
        float *to = factors + tile * C + c;
        for (int k = 0; k < 36; k++) store(to + k * plane, out[k / 6][k % 6]);
    });
}

// Products to outputs, plus the bias of each channel.
extern "C" void winograd_output(const Map *map, const float *products, const float *bias, float *y, int threads) {
    const int64_t H = map->height, W = map->width, C = map->channels, plane = map->plane;
    tiles(*map, threads, [=](int64_t b, int64_t y0, int64_t x0, int64_t tile, int64_t c) {
        Lanes in[6][6], out[4][4];
        const float *from = products + tile * C + c;
        for (int k = 0; k < 36; k++) in[k / 6][k % 6] = load(from + k * plane);
        both<6, 4>(in, out, of_product);
        const Lanes add = bias ? load(bias + c) : Lanes{};
        for (int64_t i = 0; i < 4; i++)
            for (int64_t j = 0; j < 4; j++)
                store(y + ((b * H + y0 + i) * W + x0 + j) * C + c, out[i][j] + add);
    });
}

// Gradients of outputs to gradients of products.
extern "C" void winograd_output_gradient(const Map *map, const float *of_y, float *of_products, int threads) {
    const int64_t H = map->height, W = map->width, C = map->channels, plane = map->plane;
    tiles(*map, threads, [=](int64_t b, int64_t y0, int64_t x0, int64_t tile, int64_t c) {
        Lanes in[4][4], out[6][6];
        for (int64_t i = 0; i < 4; i++)
            for (int64_t j = 0; j < 4; j++) in[i][j] = load(of_y + ((b * H + y0 + i) * W + x0 + j) * C + c);
        both<4, 6>(in, out, of_output_gradient);
        float *to = of_products + tile * C + c;
        for (int k = 0; k < 36; k++) store(to + k * plane, out[k / 6][k % 6]);
    });
}

// Gradients of factors, added to gradients of inputs, which are zeros at first: tiles overlap.
extern "C" void winograd_input_gradient(const Map *map, const float *of_factors, float *of_x, int threads) {
    const int64_t H = map->height, W = map->width, C = map->channels, plane = map->plane;
    tiles(*map, threads, [=](int64_t b, int64_t y0, int64_t x0, int64_t tile, int64_t c) {
        Lanes in[6][6], out[6][6];
        const float *from = of_factors + tile * C + c;
        for (int k = 0; k < 36; k++) in[k / 6][k % 6] = load(from + k * plane);
        both<6, 6>(in, out, of_factor_gradient);
        for (int64_t i = 0; i < 6; i++)
            for (int64_t j = 0; j < 6; j++) {
                const int64_t y = y0 + i - 1, z = x0 + j - 1;
                if (y < 0 || y >= H || z < 0 || z >= W) continue;
                float *to = of_x + ((b * H + y) * W + z) * C + c;
                store(to, load(to) + out[i][j]);
            }
    });
}

extern "C" int winograd_lanes() { return LANES; }
