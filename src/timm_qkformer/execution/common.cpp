// What all kernels share: element types, vectors, and one time step of neurons. native.py puts it before each
// of the others. Equations and symbols are those of neurons/spec.py.
//
// Compiled without contraction to fused multiply-adds: same spikes as step-by-step torch operations.

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("tree-loop-vectorize")  // Inductor, whose flags these are, writes out vectors itself
#endif

#ifdef _MSC_VER
#define EXPORT extern "C" __declspec(dllexport)
#define NOINLINE __declspec(noinline)
#else
#define EXPORT extern "C"
#define NOINLINE __attribute__((noinline))
#endif

namespace {

using Int = std::int64_t;

// How many threads a piece of work is worth, by the nanoseconds it takes one core, roughly. To wake a thread takes as long as
// tens of thousands of additions; where the machine is busy, the others wait for it for milliseconds.
constexpr Int WORTH_A_THREAD = 100000;

inline int worth(Int nanoseconds, int threads) {
    return static_cast<int>(std::max<Int>(1, std::min<Int>(threads, nanoseconds / WORTH_A_THREAD)));
}

constexpr Int ADDITIONS = 16;  // of weights, in a nanosecond

// Of a vector register.
#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif

#ifdef __GNUC__
template <class T, int n>
struct Vector {
    typedef T type __attribute__((vector_size(n * sizeof(T))));
};

template <class V, class T>
inline V vector_at(const T* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}
#endif

struct BFloat16 {
    std::uint16_t bits;
};

inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline float load(BFloat16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// To the nearest, or to the even one of two.
inline BFloat16 rounded(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t quiet = (bits >> 16) | 0x40, nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    return {static_cast<std::uint16_t>(x == x ? nearest : quiet)};
}

// Whole numbers up to 256, which all of the types hold exactly.
template <class S>
inline S whole(std::int32_t n) {
    return static_cast<S>(n);
}
template <>
inline BFloat16 whole<BFloat16>(std::int32_t n) {
    const float value = static_cast<float>(n);
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return {static_cast<std::uint16_t>(bits >> 16)};
}
template <class S>
inline std::int32_t count(S s) {
    return static_cast<std::int32_t>(s);
}
inline std::int32_t count(BFloat16 s) { return static_cast<std::int32_t>(load(s)); }

template <class X>
struct Membrane {
    using type = float;
};
template <>
struct Membrane<double> {
    using type = double;
};

}  // namespace

// What the kernels read of neurons/spec.py's NeuronSpec; its memory is laid out in native.py.
struct Neuron {
    double leak;
    double threshold;
    std::int32_t soft_reset;
    std::int32_t decay_input;
    std::int32_t ternary;
    std::int32_t max_spikes;  // of integer levels, else 0
};

namespace {

// One time step of n neurons: advances v, tells in `fired` what fires (0 or 1; -1, 0 or 1 if ternary). As wide as a
// float, flags cost no conversion.
template <bool decay_input, bool soft_reset, bool ternary, class X, class V>
inline void step_as(const X* __restrict x, V* __restrict v, std::int32_t* __restrict fired, Int n, V leak, V threshold) {
    for (Int i = 0; i < n; ++i) {
        const V current = load(x[i]);
        const V h = decay_input ? v[i] + (current - v[i]) * leak : v[i] - v[i] * leak + current;
        const std::int32_t up = h >= threshold ? 1 : 0;
        if (ternary) {
            const std::int32_t down = h <= -threshold ? 1 : 0;
            const V reset = soft_reset ? h - threshold * static_cast<V>(up - down) : V(0);
            fired[i] = up - down;
            v[i] = up + down ? reset : h;
        } else {
            const V reset = soft_reset ? h - threshold : V(0);
            fired[i] = up;
            v[i] = h >= threshold ? reset : h;
        }
    }
}

// The same for neurons that fire as often as the threshold goes into the potential, rounded.
template <bool decay_input, bool soft_reset, class X, class V>
inline void step_integer(const X* __restrict x, V* __restrict v, std::int32_t* __restrict fired, Int n, const Neuron& neuron) {
    const V leak = static_cast<V>(neuron.leak), threshold = static_cast<V>(neuron.threshold);
    for (Int i = 0; i < n; ++i) {
        const V current = load(x[i]);
        v[i] = decay_input ? v[i] + (current - v[i]) * leak : v[i] - v[i] * leak + current;
        fired[i] = 0;
    }
    for (std::int32_t k = 1; k <= neuron.max_spikes; ++k) {
        const V multiple = static_cast<V>((k - 0.5) * neuron.threshold);
        for (Int i = 0; i < n; ++i) fired[i] += v[i] >= multiple ? 1 : 0;
    }
    for (Int i = 0; i < n; ++i) {
        const V reset = soft_reset ? v[i] - threshold * static_cast<V>(fired[i]) : V(0);
        v[i] = fired[i] ? reset : v[i];
    }
}

template <bool decay_input, bool soft_reset, class X, class V>
inline void step_levels(const X* x, V* v, std::int32_t* fired, Int n, const Neuron& neuron) {
    const V leak = static_cast<V>(neuron.leak), threshold = static_cast<V>(neuron.threshold);
    if (neuron.max_spikes > 0)
        step_integer<decay_input, soft_reset>(x, v, fired, n, neuron);
    else if (neuron.ternary)
        step_as<decay_input, soft_reset, true>(x, v, fired, n, leak, threshold);
    else
        step_as<decay_input, soft_reset, false>(x, v, fired, n, leak, threshold);
}

template <class X, class V>
NOINLINE void step_of_any(const X* x, V* v, std::int32_t* fired, Int n, const Neuron& neuron) {
    if (neuron.decay_input) {
        if (neuron.soft_reset)
            step_levels<true, true>(x, v, fired, n, neuron);
        else
            step_levels<true, false>(x, v, fired, n, neuron);
    } else {
        if (neuron.soft_reset)
            step_levels<false, true>(x, v, fired, n, neuron);
        else
            step_levels<false, false>(x, v, fired, n, neuron);
    }
}

// The usual neurons in line. Of the others there is one copy: eight kinds in every place take the compiler four times as long.
template <class X, class V>
inline void step(const X* x, V* v, std::int32_t* fired, Int n, const Neuron& neuron) {
    if (neuron.decay_input && !neuron.soft_reset && !neuron.ternary && neuron.max_spikes == 0)
        step_as<true, false, false>(x, v, fired, n, static_cast<V>(neuron.leak), static_cast<V>(neuron.threshold));
    else
        step_of_any(x, v, fired, n, neuron);
}

// Potentials of an operator's neurons, one tensor for each neuron: before a call (null: at rest) and after it (null: not
// wanted). Both may be the same.
template <class V>
struct Potentials {
    const V* const* before;
    V* const* after;

    void take(int neuron, Int at, Int n, V* to) const {
        if (before != nullptr) {
            std::copy_n(before[neuron] + at, n, to);
        } else {
            std::fill_n(to, n, V(0));
        }
    }

    void keep(int neuron, Int at, Int n, const V* from) const {
        if (after != nullptr) std::copy_n(from, n, after[neuron] + at);
    }
};

}  // namespace
