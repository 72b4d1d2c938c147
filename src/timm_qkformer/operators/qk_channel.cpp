// Q-K channel attention, for deployment: from the fused currents of its projections to what `attend` gives, channels last. X is the
// type of the currents, S that of spikes. The readable version is the Python file of the same name.
// What comes before this file is common.cpp.

#include <vector>

namespace {

// Q-K channel attention: currents [T, B, N, 2 C] of queries and keys to masked keys [T, B, N, C].
template <class X, class S>
void channel_attention(const X* x, S* out, Int T, Int B, Int N, Int C, const Neuron& neuron_q, const Neuron& neuron_k,
                       const Neuron& neuron_attn, const Potentials<typename Membrane<X>::type>& carried,
                       int threads) {
    using V = typename Membrane<X>::type;
    constexpr Int width = 32;
    const Int strips = (C + width - 1) / width;
#pragma omp parallel num_threads(worth(2 * T * B * N * C, threads))
    {
        std::vector<V> q(N * width), k(N * width);
#pragma omp for schedule(static)
        for (Int item = 0; item < B * strips; ++item) {
            const Int b = item / strips, start = item % strips * width;
            const Int n = std::min(width, C - start);
            V potentials[width];
            carried.take(2, b * C + start, n, potentials);
            for (Int token = 0; token < N; ++token) {
                carried.take(0, (b * N + token) * C + start, n, q.data() + token * width);
                carried.take(1, (b * N + token) * C + start, n, k.data() + token * width);
            }
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
            carried.keep(2, b * C + start, n, potentials);
            for (Int token = 0; token < N; ++token) {
                carried.keep(0, (b * N + token) * C + start, n, q.data() + token * width);
                carried.keep(1, (b * N + token) * C + start, n, k.data() + token * width);
            }
        }
    }
}

}  // namespace

#define KERNEL(SUFFIX, X, S)                                                                                          \
    EXPORT void channel_attention_##SUFFIX(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale,   \
                                const Neuron* neurons, const Membrane<X>::type* const* before,                        \
                                Membrane<X>::type* const* after, int threads) {                                       \
        (void)heads, (void)scale;                                                                                     \
        channel_attention(x, out, T, B, N, C, neurons[0], neurons[1], neurons[2], {before, after}, threads);          \
    }
