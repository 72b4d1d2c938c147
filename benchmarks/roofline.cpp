// What a processor adds up of weights in its first cache where nothing else is to be done: the inner loop of
// execution/events.cpp over one row of spikes without end. roofline.py puts
// execution/common.cpp before it, compiles it and calls it.

namespace {

constexpr int WIDTH = 64;  // output channels

}  // namespace

// For each thread: adds the weights of `events` channels up, weights [channels, WIDTH].
EXPORT void add_float32(const float* weights, const std::uint16_t* channels, Int events, float* sums,
                            int threads) {
    using V = Vector<float, BYTES / sizeof(float)>::type;
    constexpr int N = WIDTH * sizeof(float) / BYTES;
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        V sum[N] = {};
        for (Int e = 0; e < events; ++e)
            for (int i = 0; i < N; ++i)
                sum[i] += vector_at<V>(weights + channels[e] * WIDTH + i * (BYTES / sizeof(float)));
        std::memcpy(sums + thread * WIDTH, sum, sizeof sum);
    }
}

// Two weights in a word, as the kernel adds them.
EXPORT void add_int8(const std::uint8_t* weights, const std::uint16_t* channels, Int events,
                         std::uint16_t* sums, int threads) {
    using V = Vector<std::uint16_t, BYTES / sizeof(std::uint16_t)>::type;
    constexpr int N = WIDTH / BYTES;
#pragma omp parallel for num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        V word[N] = {}, upper[N] = {};
        for (Int e = 0; e < events; ++e) {
            for (int i = 0; i < N; ++i) {
                const V weight = vector_at<V>(weights + channels[e] * WIDTH + i * BYTES);
                word[i] += weight;
                upper[i] += weight >> 8;
            }
        }
        std::memcpy(sums + thread * WIDTH, word, sizeof word);
        std::memcpy(sums + thread * WIDTH + WIDTH / 2, upper, sizeof upper);
    }
}
