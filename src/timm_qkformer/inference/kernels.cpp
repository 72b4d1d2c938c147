// Spiking neurons of deployed models, fused with what lies next to them. The readable versions are in reference.py,
// equations and symbols in layers/dynamics.py; what comes before this file is neurons.cpp.
//
// Tensors are channels last, [T, B, N, C] with N tokens or [T, B, H, W, C] with pixels, C contiguous. X is the type of
// the input currents, S that of spikes and spike sums (1 byte where they feed int8 products). Potentials are float, or
// double for double currents. A block of neurons runs through all T steps while its potentials stay in the cache.

#include <limits>
#include <vector>

namespace {

constexpr Int BLOCK = 256;  // neurons that advance together

// Spikes of currents [T, M], with `sums` added if there are any. Steps lie x_step, sums_step and out_step apart.
template <class X, class S>
void fire(const X* x, Int x_step, const S* sums, Int sums_step, S* out, Int out_step, Int T, Int M,
          const Neuron& neuron, int threads) {
    using V = typename Membrane<X>::type;
    const Int blocks = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Int block = 0; block < blocks; ++block) {
        const Int start = block * BLOCK;
        const Int n = std::min(BLOCK, M - start);
        V v[BLOCK] = {};
        std::int32_t fired[BLOCK];
        for (Int t = 0; t < T; ++t) {
            step(x + t * x_step + start, v, fired, n, neuron);
            S* to = out + t * out_step + start;
            if (sums == nullptr) {
                for (Int i = 0; i < n; ++i) to[i] = whole<S>(fired[i]);
            } else {
                const S* from = sums + t * sums_step + start;
                for (Int i = 0; i < n; ++i) to[i] = whole<S>(count(from[i]) + fired[i]);
            }
        }
    }
}

// Spikes of 3x3 max-pooled currents (stride 2, padding 1): [T, B, H, W, C] to [T, B, ceil(H / 2), ceil(W / 2), C].
// Steps of x lie x_step apart; 0: the same currents at every step.
template <class X, class S>
void pool_fire(const X* x, Int x_step, S* out, Int T, Int B, Int H, Int W, Int C, const Neuron& neuron, int threads) {
    using V = typename Membrane<X>::type;
    const Int rows = (H + 1) / 2, columns = (W + 1) / 2;
    const Int out_step = B * rows * columns * C;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Int line = 0; line < B * rows; ++line) {
        const Int b = line / rows, row = line % rows;
        const Int top = std::max<Int>(2 * row - 1, 0), bottom = std::min<Int>(2 * row + 1, H - 1);
        for (Int column = 0; column < columns; ++column) {
            const Int left = std::max<Int>(2 * column - 1, 0), right = std::min<Int>(2 * column + 1, W - 1);
            for (Int start = 0; start < C; start += BLOCK) {
                const Int n = std::min(BLOCK, C - start);
                V v[BLOCK] = {}, currents[BLOCK];
                std::int32_t fired[BLOCK];
                for (Int t = 0; t < T; ++t) {
                    if (t == 0 || x_step != 0) {
                        const X* image = x + t * x_step + b * H * W * C + start;
                        std::fill_n(currents, n, -std::numeric_limits<V>::infinity());
                        for (Int h = top; h <= bottom; ++h)
                            for (Int w = left; w <= right; ++w) {
                                const X* pixel = image + (h * W + w) * C;
                                for (Int i = 0; i < n; ++i) {
                                    const V value = load(pixel[i]);
                                    currents[i] = currents[i] > value ? currents[i] : value;
                                }
                            }
                    }
                    step(currents, v, fired, n, neuron);
                    S* to = out + t * out_step + (line * columns + column) * C + start;
                    for (Int i = 0; i < n; ++i) to[i] = whole<S>(fired[i]);
                }
            }
        }
    }
}

// Q-K token attention: currents [T, M, 2 C] of queries and keys to masked keys [T, M, C].
template <class X, class S>
void token_attention(const X* x, S* out, Int T, Int M, Int C, Int heads, const Neuron& neuron_q,
                     const Neuron& neuron_k, const Neuron& neuron_attn, int threads) {
    using V = typename Membrane<X>::type;
    const Int dim = C / heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<V> q(C), k(C), potentials(heads), counts(heads);
        std::vector<std::int32_t> fired(C), mask(heads);
#pragma omp for schedule(static)
        for (Int m = 0; m < M; ++m) {
            std::fill(q.begin(), q.end(), V(0));
            std::fill(k.begin(), k.end(), V(0));
            std::fill(potentials.begin(), potentials.end(), V(0));
            for (Int t = 0; t < T; ++t) {
                const X* from = x + (t * M + m) * 2 * C;
                step(from, q.data(), fired.data(), C, neuron_q);
                for (Int head = 0; head < heads; ++head) {
                    std::int32_t sum = 0;
                    for (Int i = head * dim; i < (head + 1) * dim; ++i) sum += fired[i];
                    counts[head] = static_cast<V>(sum);
                }
                step(counts.data(), potentials.data(), mask.data(), heads, neuron_attn);
                step(from + C, k.data(), fired.data(), C, neuron_k);
                S* to = out + (t * M + m) * C;
                for (Int head = 0; head < heads; ++head) {
                    const std::int32_t kept = mask[head];
                    for (Int i = head * dim; i < (head + 1) * dim; ++i) to[i] = whole<S>(fired[i] & kept);
                }
            }
        }
    }
}

// Q-K channel attention: currents [T, B, N, 2 C] of queries and keys to masked keys [T, B, N, C].
template <class X, class S>
void channel_attention(const X* x, S* out, Int T, Int B, Int N, Int C, const Neuron& neuron_q, const Neuron& neuron_k,
                       const Neuron& neuron_attn, int threads) {
    using V = typename Membrane<X>::type;
    constexpr Int width = 32;
    const Int strips = (C + width - 1) / width;
#pragma omp parallel num_threads(threads)
    {
        std::vector<V> q(N * width), k(N * width);
#pragma omp for schedule(static)
        for (Int item = 0; item < B * strips; ++item) {
            const Int b = item / strips, start = item % strips * width;
            const Int n = std::min(width, C - start);
            V potentials[width] = {};
            std::fill(q.begin(), q.end(), V(0));
            std::fill(k.begin(), k.end(), V(0));
            for (Int t = 0; t < T; ++t) {
                std::int32_t sums[width] = {};
                V counts[width] = {};
                std::int32_t fired[width], mask[width];
                const X* from = x + (t * B + b) * N * 2 * C + start;
                for (Int token = 0; token < N; ++token) {
                    step(from + token * 2 * C, q.data() + token * width, fired, n, neuron_q);
                    for (Int i = 0; i < n; ++i) sums[i] += fired[i];
                }
                for (Int i = 0; i < n; ++i) counts[i] = static_cast<V>(sums[i]);
                step(counts, potentials, mask, n, neuron_attn);
                S* to = out + (t * B + b) * N * C + start;
                for (Int token = 0; token < N; ++token) {
                    step(from + token * 2 * C + C, k.data() + token * width, fired, n, neuron_k);
                    for (Int i = 0; i < n; ++i) to[token * C + i] = whole<S>(fired[i] & mask[i]);
                }
            }
        }
    }
}

template <class Sum>
inline void add(Sum* __restrict to, const Sum* __restrict from, Int n) {
    for (Int i = 0; i < n; ++i) to[i] = static_cast<Sum>(to[i] + from[i]);
}

// Who fires, without a branch for each neuron: which ones do cannot be predicted.
inline Int indices_of(const std::int32_t* fired, Int n, Int* indices) {
    Int found = 0;
    for (Int i = 0; i < n; ++i) {
        indices[found] = i;
        found += fired[i];
    }
    return found;
}

// Spiking self-attention: currents [T, B, N, 3 C] of queries, keys and values to spikes [T, B, N, C] of
// scale * Q (K^T V). Spikes select which rows are summed, so nothing is multiplied and nothing rounded. Sums reach
// N * C / heads, which must fit Sum.
template <class Sum, class X, class S>
void self_attention_as(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale, const Neuron& neuron_q,
                       const Neuron& neuron_k, const Neuron& neuron_v, const Neuron& neuron_attn, int threads) {
    using V = typename Membrane<X>::type;
    const Int dim = C / heads;
#pragma omp parallel num_threads(threads)
    {
        std::vector<V> q(N * dim), k(N * dim), v(N * dim), attn(N * dim), currents(dim);
        std::vector<std::int32_t> fired(dim);
        std::vector<Int> indices(dim);
        std::vector<Sum> product(dim * dim), values(dim), sum(dim);
#pragma omp for schedule(static)
        for (Int item = 0; item < B * heads; ++item) {
            const Int b = item / heads, start = item % heads * dim;
            for (auto* potentials : {&q, &k, &v, &attn}) std::fill(potentials->begin(), potentials->end(), V(0));
            for (Int t = 0; t < T; ++t) {
                const X* from = x + (t * B + b) * N * 3 * C + start;
                std::fill(product.begin(), product.end(), Sum(0));
                for (Int token = 0; token < N; ++token) {
                    const X* row = from + token * 3 * C;
                    step(row + 2 * C, v.data() + token * dim, fired.data(), dim, neuron_v);
                    for (Int i = 0; i < dim; ++i) values[i] = static_cast<Sum>(fired[i]);
                    step(row + C, k.data() + token * dim, fired.data(), dim, neuron_k);
                    const Int found = indices_of(fired.data(), dim, indices.data());
                    for (Int j = 0; j < found; ++j) add(product.data() + indices[j] * dim, values.data(), dim);
                }
                S* to = out + (t * B + b) * N * C + start;
                for (Int token = 0; token < N; ++token) {
                    step(from + token * 3 * C, q.data() + token * dim, fired.data(), dim, neuron_q);
                    const Int found = indices_of(fired.data(), dim, indices.data());
                    std::fill(sum.begin(), sum.end(), Sum(0));
                    for (Int j = 0; j < found; ++j) add(sum.data(), product.data() + indices[j] * dim, dim);
                    for (Int i = 0; i < dim; ++i) currents[i] = static_cast<V>(sum[i]) * static_cast<V>(scale);
                    step(currents.data(), attn.data() + token * dim, fired.data(), dim, neuron_attn);
                    for (Int i = 0; i < dim; ++i) to[token * C + i] = whole<S>(fired[i]);
                }
            }
        }
    }
}

template <class X, class S>
void self_attention(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale, const Neuron* neurons,
                    int threads) {
    const bool fits = N * (C / heads) <= std::numeric_limits<std::uint16_t>::max();
    (fits ? self_attention_as<std::uint16_t, X, S> : self_attention_as<std::int32_t, X, S>)(
        x, out, T, B, N, C, heads, scale, neurons[0], neurons[1], neurons[2], neurons[3], threads);
}

}  // namespace

// native.py appends a line with the types that are needed.
#define KERNELS(SUFFIX, X, S)                                                                                         \
    EXPORT void fire_##SUFFIX(const X* x, Int x_step, const S* sums, Int sums_step, S* out, Int out_step, Int T,      \
                              Int M, const Neuron* neuron, int threads) {                                             \
        fire(x, x_step, sums, sums_step, out, out_step, T, M, *neuron, threads);                                      \
    }                                                                                                                 \
    EXPORT void pool_fire_##SUFFIX(const X* x, Int x_step, S* out, Int T, Int B, Int H, Int W, Int C,                 \
                                   const Neuron* neuron, int threads) {                                               \
        pool_fire(x, x_step, out, T, B, H, W, C, *neuron, threads);                                                   \
    }                                                                                                                 \
    EXPORT void token_attention_##SUFFIX(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads,                   \
                                         const Neuron* neurons, int threads) {                                        \
        token_attention(x, out, T, B * N, C, heads, neurons[0], neurons[1], neurons[2], threads);                     \
    }                                                                                                                 \
    EXPORT void channel_attention_##SUFFIX(const X* x, S* out, Int T, Int B, Int N, Int C, Int /* heads */,           \
                                           const Neuron* neurons, int threads) {                                      \
        channel_attention(x, out, T, B, N, C, neurons[0], neurons[1], neurons[2], threads);                           \
    }                                                                                                                 \
    EXPORT void self_attention_##SUFFIX(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale,      \
                                        const Neuron* neurons, int threads) {                                         \
        self_attention(x, out, T, B, N, C, heads, scale, neurons, threads);                                           \
    }
