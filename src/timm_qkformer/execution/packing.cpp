// Whole numbers in 1, 2, 4 or 8 bits an element; the readable version and the layout are in packing.py. One pass over
// memory packs, compares each number with what was declared, and sums up the spikes.
// What comes before this file is common.cpp.

namespace {

constexpr Int CHUNK = 4096;  // bytes that are packed together

// Elements x [n] to bytes out [size], bits each, from `low` upwards. `spikes`: the sum of their absolute values, or -1 if
// one of them is no whole number from low to high.
template <class X>
void pack(const X* x, Int n, std::uint8_t* out, int bits, Int size, std::int32_t low, std::int32_t high,
          std::int64_t* spikes, int threads) {
    std::int64_t sum = 0;
    int misfits = 0;
#pragma omp parallel for num_threads(worth(n / 4, threads)) schedule(static) reduction(+ : sum) reduction(| : misfits)
    for (Int start = 0; start < size; start += CHUNK) {
        std::uint8_t* to = out + start;
        for (int k = 0; k < 8 / bits; ++k) {
            const Int first = k * size + start;
            const Int room = std::min(CHUNK, size - start), found = std::max<Int>(0, std::min(room, n - first));
            if (k == 0) std::memset(to, 0, room);
            const X* from = x + first;
            std::int32_t part = 0, wrong = 0;
            const int shift = k * bits;
            for (Int i = 0; i < found; ++i) {
                const float value = load(from[i]);
                const std::int32_t whole = static_cast<std::int32_t>(value);
                wrong |= (static_cast<float>(whole) != value) | (whole < low) | (whole > high);
                part += whole < 0 ? -whole : whole;
                to[i] |= static_cast<std::uint8_t>((whole - low) << shift);
            }
            sum += part;
            misfits |= wrong;
        }
    }
    *spikes = misfits ? -1 : sum;
}

inline void store(float* to, std::int32_t n) { *to = static_cast<float>(n); }
inline void store(BFloat16* to, std::int32_t n) { *to = whole<BFloat16>(n); }
inline void store(std::uint8_t* to, std::int32_t n) { *to = static_cast<std::uint8_t>(n); }

template <class X>
void unpack(const std::uint8_t* data, int bits, Int size, std::int32_t low, X* x, Int n, int threads) {
    const std::int32_t mask = (1 << bits) - 1;
#pragma omp parallel for num_threads(worth(n / 4, threads)) schedule(static)
    for (Int start = 0; start < size; start += CHUNK) {
        for (int k = 0; k < 8 / bits; ++k) {
            const Int first = k * size + start;
            const Int found = std::max<Int>(0, std::min(std::min(CHUNK, size - start), n - first));
            const std::uint8_t* from = data + start;
            X* to = x + first;
            const int shift = k * bits;
            for (Int i = 0; i < found; ++i) store(to + i, ((from[i] >> shift) & mask) + low);
        }
    }
}

}  // namespace

#define PACKING(SUFFIX, X)                                                                                             \
    EXPORT void pack_##SUFFIX(const X* x, Int n, std::uint8_t* out, Int bits, Int size, Int low, Int high,             \
                              std::int64_t* spikes, int threads) {                                                     \
        pack(x, n, out, static_cast<int>(bits), size, static_cast<std::int32_t>(low), static_cast<std::int32_t>(high), \
             spikes, threads);                                                                                         \
    }
#define UNPACKING(SUFFIX, X)                                                                                           \
    EXPORT void unpack_##SUFFIX(const std::uint8_t* data, Int bits, Int size, Int low, X* x, Int n, int threads) {     \
        unpack(data, static_cast<int>(bits), size, static_cast<std::int32_t>(low), x, n, threads);                     \
    }

PACKING(float32, float)
PACKING(bfloat16, BFloat16)
UNPACKING(float32, float)
UNPACKING(bfloat16, BFloat16)
UNPACKING(uint8, std::uint8_t)
