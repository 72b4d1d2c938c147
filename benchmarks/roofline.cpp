// What a processor adds up of weights in its first cache where nothing else is to be done: the inner loop of
// execution/events.cpp over one row of spikes without end. roofline.py compiles and calls it.

#include <cstdint>
#include <cstring>

namespace {

#ifdef __AVX512F__
constexpr int BYTES = 64;
#else
constexpr int BYTES = 32;
#endif
constexpr int WIDTH = 64;  // output channels

template <class T>
struct Vector {
    typedef T type __attribute__((vector_size(BYTES)));
};

template <class V>
V at(const void* from) {
    V value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

}  // namespace

// For each thread: adds the weights of `events` channels up, weights [channels, WIDTH].
extern "C" void add_float32(const float* weights, const std::uint16_t* channels, std::int64_t events, float* sums,
                            int threads) {
    using V = Vector<float>::type;
    constexpr int N = WIDTH * sizeof(float) / BYTES;
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        V sum[N] = {};
        for (std::int64_t e = 0; e < events; ++e)
            for (int i = 0; i < N; ++i) sum[i] += at<V>(weights + channels[e] * WIDTH + i * (BYTES / sizeof(float)));
        std::memcpy(sums + thread * WIDTH, sum, sizeof sum);
    }
}

// Two weights in a word, as the kernel adds them.
extern "C" void add_int8(const std::uint8_t* weights, const std::uint16_t* channels, std::int64_t events,
                         std::uint16_t* sums, int threads) {
    using V = Vector<std::uint16_t>::type;
    constexpr int N = WIDTH / BYTES;
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        V word[N] = {}, upper[N] = {};
        for (std::int64_t e = 0; e < events; ++e) {
            for (int i = 0; i < N; ++i) {
                const V weight = at<V>(weights + channels[e] * WIDTH + i * BYTES);
                word[i] += weight;
                upper[i] += weight >> 8;
            }
        }
        std::memcpy(sums + thread * WIDTH, word, sizeof word);
        std::memcpy(sums + thread * WIDTH + WIDTH / 2, upper, sizeof upper);
    }
}
