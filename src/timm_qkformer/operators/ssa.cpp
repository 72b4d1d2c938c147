// Spiking self-attention, for deployment: from the fused currents of its projections to what `attend` gives, channels last. X is the
// type of the currents, S that of spikes. The readable version is the Python file of the same name.
// What comes before this file is common.cpp.

#include <limits>
#include <vector>

namespace {

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
                       const Neuron& neuron_k, const Neuron& neuron_v, const Neuron& neuron_attn,
                       const Potentials<typename Membrane<X>::type>& carried, int threads) {
    using V = typename Membrane<X>::type;
    const Int dim = C / heads;
#pragma omp parallel num_threads(worth(T * B * N * C * (3 + dim / ADDITIONS), threads))
    {
        std::vector<V> q(N * dim), k(N * dim), v(N * dim), attn(N * dim), currents(dim);
        std::vector<std::int32_t> fired(dim);
        std::vector<Int> indices(dim);
        std::vector<Sum> product(dim * dim), values(dim), sum(dim);
#pragma omp for schedule(static)
        for (Int item = 0; item < B * heads; ++item) {
            const Int b = item / heads, start = item % heads * dim;
            for (Int token = 0; token < N; ++token) {
                const Int at = (b * N + token) * C + start;
                carried.take(0, at, dim, q.data() + token * dim);
                carried.take(1, at, dim, k.data() + token * dim);
                carried.take(2, at, dim, v.data() + token * dim);
                for (Int i = 0; i < dim; ++i) carried.take(3, (item * dim + i) * N + token, 1, &attn[token * dim + i]);
            }
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
            for (Int token = 0; token < N && carried.after != nullptr; ++token) {
                const Int at = (b * N + token) * C + start;
                carried.keep(0, at, dim, q.data() + token * dim);
                carried.keep(1, at, dim, k.data() + token * dim);
                carried.keep(2, at, dim, v.data() + token * dim);
                for (Int i = 0; i < dim; ++i) carried.keep(3, (item * dim + i) * N + token, 1, &attn[token * dim + i]);
            }
        }
    }
}

template <class X, class S>
void self_attention(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale, const Neuron* neurons,
                    const Potentials<typename Membrane<X>::type>& carried, int threads) {
    const bool fits = N * (C / heads) <= std::numeric_limits<std::uint16_t>::max();
    (fits ? self_attention_as<std::uint16_t, X, S> : self_attention_as<std::int32_t, X, S>)(
        x, out, T, B, N, C, heads, scale, neurons[0], neurons[1], neurons[2], neurons[3], carried, threads);
}

}  // namespace

#define KERNEL(SUFFIX, X, S)                                                                                          \
    EXPORT void self_attention_##SUFFIX(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale,      \
                                const Neuron* neurons, const Membrane<X>::type* const* before,                        \
                                Membrane<X>::type* const* after, int threads) {                                       \
        self_attention(x, out, T, B, N, C, heads, scale, neurons, {before, after}, threads);                          \
    }
