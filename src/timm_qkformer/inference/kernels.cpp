// Spiking neurons of deployed models, fused with what lies next to them. The readable versions are in kernels.py,
// equations and symbols in neurons/spec.py; what comes before this file is common.cpp.
//
// Tensors are channels last, [T, B, N, C] with N tokens or [T, B, H, W, C] with pixels, C contiguous. X is the type of
// the input currents, S that of spikes and spike sums (1 byte where they feed int8 products). Potentials are float, or
// double for double currents. A block of neurons runs through all T steps while its potentials stay in the cache.

#include <limits>

namespace {

constexpr Int BLOCK = 256;  // neurons that advance together

// A sum and a spike. Sums are whole numbers, or any where a stream of currents takes spikes.
template <class S>
inline S plus(S sum, std::int32_t fired) {
    return static_cast<S>(sum + static_cast<S>(fired));
}
inline BFloat16 plus(BFloat16 sum, std::int32_t fired) { return whole<BFloat16>(count(sum) + fired); }

// Spikes of currents [T, M], with `sums` added if there are any. Steps lie x_step, sums_step and out_step apart. Neurons
// continue from the potentials `before` [M] and leave theirs in `after`, if there are any; both may be the same.
template <class X, class S>
void fire(const X* x, Int x_step, const S* sums, Int sums_step, S* out, Int out_step, Int T, Int M,
          const Neuron& neuron, const typename Membrane<X>::type* before, typename Membrane<X>::type* after,
          int threads) {
    using V = typename Membrane<X>::type;
    const Int blocks = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(worth(T * M / 2, threads)) schedule(static)
    for (Int block = 0; block < blocks; ++block) {
        const Int start = block * BLOCK;
        const Int n = std::min(BLOCK, M - start);
        V v[BLOCK] = {};
        std::int32_t fired[BLOCK];
        if (before != nullptr) std::copy_n(before + start, n, v);
        for (Int t = 0; t < T; ++t) {
            step(x + t * x_step + start, v, fired, n, neuron);
            S* to = out + t * out_step + start;
            if (sums == nullptr) {
                for (Int i = 0; i < n; ++i) to[i] = whole<S>(fired[i]);
            } else {
                const S* from = sums + t * sums_step + start;
                for (Int i = 0; i < n; ++i) to[i] = plus(from[i], fired[i]);
            }
        }
        if (after != nullptr) std::copy_n(v, n, after + start);
    }
}

// Spikes of 3x3 max-pooled currents (stride 2, padding 1): [T, B, H, W, C] to [T, B, ceil(H / 2), ceil(W / 2), C].
// NaN is the largest, as in torch.
// Steps of x lie x_step apart; 0: the same currents at every step. Potentials are those of `fire`.
template <class X, class S>
void pool_fire(const X* x, Int x_step, S* out, Int T, Int B, Int H, Int W, Int C, const Neuron& neuron,
               const typename Membrane<X>::type* before, typename Membrane<X>::type* after, int threads) {
    using V = typename Membrane<X>::type;
    const Int rows = (H + 1) / 2, columns = (W + 1) / 2;
    const Int out_step = B * rows * columns * C;
#pragma omp parallel for num_threads(worth(2 * T * out_step, threads)) schedule(static)
    for (Int line = 0; line < B * rows; ++line) {
        const Int b = line / rows, row = line % rows;
        const Int top = std::max<Int>(2 * row - 1, 0), bottom = std::min<Int>(2 * row + 1, H - 1);
        for (Int column = 0; column < columns; ++column) {
            const Int left = std::max<Int>(2 * column - 1, 0), right = std::min<Int>(2 * column + 1, W - 1);
            for (Int start = 0; start < C; start += BLOCK) {
                const Int n = std::min(BLOCK, C - start);
                V v[BLOCK] = {}, currents[BLOCK];
                std::int32_t fired[BLOCK];
                const Int at = (line * columns + column) * C + start;
                if (before != nullptr) std::copy_n(before + at, n, v);
                for (Int t = 0; t < T; ++t) {
                    if (t == 0 || x_step != 0) {
                        const X* image = x + t * x_step + b * H * W * C + start;
                        std::fill_n(currents, n, -std::numeric_limits<V>::infinity());
                        for (Int h = top; h <= bottom; ++h)
                            for (Int w = left; w <= right; ++w) {
                                const X* pixel = image + (h * W + w) * C;
                                for (Int i = 0; i < n; ++i) {
                                    const V value = load(pixel[i]);
                                    currents[i] = value > currents[i] || value != value ? value : currents[i];
                                }
                            }
                    }
                    step(currents, v, fired, n, neuron);
                    S* to = out + t * out_step + at;
                    for (Int i = 0; i < n; ++i) to[i] = whole<S>(fired[i]);
                }
                if (after != nullptr) std::copy_n(v, n, after + at);
            }
        }
    }
}

}  // namespace

// kernels.py appends a line with the types that are needed.
#define KERNEL(SUFFIX, X, S)                                                                                          \
    EXPORT void fire_##SUFFIX(const X* x, Int x_step, const S* sums, Int sums_step, S* out, Int out_step, Int T,      \
                              Int M, const Neuron* neuron, const Membrane<X>::type* before,                           \
                              Membrane<X>::type* after, int threads) {                                                \
        fire(x, x_step, sums, sums_step, out, out_step, T, M, *neuron, before, after, threads);                       \
    }                                                                                                                 \
    EXPORT void pool_fire_##SUFFIX(const X* x, Int x_step, S* out, Int T, Int B, Int H, Int W, Int C,                 \
                                   const Neuron* neuron, const Membrane<X>::type* before,                             \
                                   Membrane<X>::type* after, int threads) {                                           \
        pool_fire(x, x_step, out, T, B, H, W, C, *neuron, before, after, threads);                                    \
    }
