// Q-K token attention, for deployment: from the fused currents of its projections to what `attend` gives, channels last. X is the
// type of the currents, S that of spikes. The readable version is the Python file of the same name.
// What comes before this file is common.cpp.

#include <vector>

namespace {

// Q-K token attention: currents [T, B, N, 2 C] of queries and keys to masked keys [T, B, N, C].
template <class X, class S>
void token_attention(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, const Neuron& neuron_q,
                     const Neuron& neuron_k, const Neuron& neuron_attn,
                     const Potentials<typename Membrane<X>::type>& carried, int threads) {
    using V = typename Membrane<X>::type;
    const Int dim = C / heads, M = B * N;
#pragma omp parallel num_threads(worth(2 * T * M * C, threads))
    {
        std::vector<V> q(C), k(C), potentials(heads), counts(heads);
        std::vector<std::int32_t> fired(C), mask(heads);
#pragma omp for schedule(static)
        for (Int m = 0; m < M; ++m) {
            const Int mask_at = m / N * heads * N + m % N;  // of the first head, the others N apart
            carried.take(0, m * C, C, q.data());
            carried.take(1, m * C, C, k.data());
            for (Int head = 0; head < heads; ++head) carried.take(2, mask_at + head * N, 1, &potentials[head]);
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
            carried.keep(0, m * C, C, q.data());
            carried.keep(1, m * C, C, k.data());
            for (Int head = 0; head < heads; ++head) carried.keep(2, mask_at + head * N, 1, &potentials[head]);
        }
    }
}

}  // namespace

#define KERNEL(SUFFIX, X, S)                                                                                          \
    EXPORT void token_attention_##SUFFIX(const X* x, S* out, Int T, Int B, Int N, Int C, Int heads, double scale,     \
                                const Neuron* neurons, const Membrane<X>::type* const* before,                        \
                                Membrane<X>::type* const* after, int threads) {                                       \
        (void)scale;                                                                                                  \
        token_attention(x, out, T, B, N, C, heads, neurons[0], neurons[1], neurons[2], {before, after}, threads);     \
    }
