// Convolutions of spikes, event by event: for every spike that an output sees, the spike's weights are added to it, and
// silent neurons cost nothing. These are the additions that the paper's energy model counts, but that a sum of several
// spikes is added at once, its weights times the sum. The dense products that they stand for are in inference/projection.py.
//
// Tensors are channels last, [M, H, W, C] with M = T B. Spikes and spike sums are bytes. Weights come in tiles of WIDTH
// output channels, [C' / WIDTH, k k, C, WIDTH], so that a tile stays in the cache while all outputs of it are computed
// and an event reads a piece of memory from end to end. Neurons that follow fire before their currents leave the cache.
// What comes before this file is common.cpp.

#include <memory>

#if !defined(__GNUC__)
#error "event-driven convolutions need the vector extensions of GCC or Clang"
#endif

namespace {

using Channel = std::uint16_t;

// A sum of spikes above one.
struct Several {
    Channel channel, times;
};

constexpr std::uint64_t LOWEST = 0x0101010101010101, ALL_BUT_HIGHEST = 0x7F7F7F7F7F7F7F7F;  // bits of eight bytes

// The lowest bit of each byte that is not zero.
inline std::uint64_t where_not_zero(std::uint64_t bytes) {
    return ((((bytes & ALL_BUT_HIGHEST) + ALL_BUT_HIGHEST) | bytes) >> 7) & LOWEST;
}

// Eight bytes' lowest bits side by side.
inline std::uint64_t together(std::uint64_t lowest) { return lowest * 0x0102040810204080 >> 56; }

constexpr Int AT_ONCE = 64;  // channels

// Some of a pixel's channels, AT_ONCE at most, as words of eight bytes.
struct Some {
    std::uint64_t words[AT_ONCE / 8];

    Some(const std::uint8_t* x, Int n) {
        if (n == AT_ONCE) {
            std::memcpy(words, x, AT_ONCE);
        } else {
            std::memset(words, 0, sizeof words);
            std::memcpy(words, x, n);
        }
    }
    Int not_zero() const {
        Int count = 0;
        for (const std::uint64_t bytes : words) count += __builtin_popcountll(where_not_zero(bytes));
        return count;
    }
    // Channels of single spikes, and of several, as bits.
    void split(std::uint64_t& single, std::uint64_t& several) const {
        single = several = 0;
        for (int i = 0; i < AT_ONCE / 8; ++i) {
            const std::uint64_t more = where_not_zero(words[i] & ~LOWEST);
            single |= together(words[i] & LOWEST & ~more) << 8 * i;
            several |= together(more) << 8 * i;
        }
    }
};

constexpr Int LISTED = 2;  // channels, in a nanosecond
constexpr Int SPARE = 4;  // events that are written before it is known whether they are any

// Calls `write` with the places of bits, one after the other, and for up to SPARE - 1 more. Returns how many there are.
template <class Write>
inline Int write_places(std::uint64_t bits, const Write& write) {
    const Int count = __builtin_popcountll(bits);
    for (Int i = 0; i < count; i += SPARE)  // in fours: where the last one is cannot be predicted
        for (Int j = 0; j < SPARE; ++j, bits &= bits - 1) write(i + j, __builtin_ctzll(bits | std::uint64_t(1) << 63));
    return count;
}

// Memory that grows and is never cleared.
template <class T>
class Buffer {
    std::unique_ptr<T[]> items;
    Int size = 0;

   public:
    T* get() const { return items.get(); }
    T& operator[](Int i) const { return items[i]; }
    void resize(Int n) {
        if (n > size) items.reset(new T[size = n]);
    }
};

// What arrives at rows, each a block of a pixel's channels: single spikes, and sums of several. Row r is block r % blocks of
// pixel r / blocks.
struct Events {
    Buffer<Int> of_pixel;  // where those of its rows begin
    Buffer<Int> begin, single_end, several_end;
    Buffer<Channel> single;
    Buffer<Several> several;
    Int total = 0;
};

const Events& list_events(const std::uint8_t* x, Int pixels, Int C, Int block, int threads) {
    const Int blocks = (C + block - 1) / block, rows = pixels * blocks;
    const int listing = worth(pixels * C / LISTED, threads);
    static thread_local Events of_this_thread;  // kept for the next convolution: fresh pages cost more than the listing
    Events& events = of_this_thread;
    events.of_pixel.resize(pixels);
    for (Buffer<Int>* ends : {&events.begin, &events.single_end, &events.several_end}) ends->resize(rows);
#pragma omp parallel for num_threads(listing) schedule(static)
    for (Int pixel = 0; pixel < pixels; ++pixel) {
        Int count = 0;
        for (Int c = 0; c < C; c += AT_ONCE) count += Some(x + pixel * C + c, std::min(AT_ONCE, C - c)).not_zero();
        events.of_pixel[pixel] = count;
    }
    events.total = 0;
    for (Int pixel = 0; pixel < pixels; ++pixel) {
        const Int count = events.of_pixel[pixel];
        events.of_pixel[pixel] = events.total + pixel * blocks * SPARE;
        events.total += count;
    }
    events.single.resize(events.total + rows * SPARE);
    events.several.resize(events.total + rows * SPARE);
#pragma omp parallel for num_threads(listing) schedule(static)
    for (Int pixel = 0; pixel < pixels; ++pixel) {
        Int begin = events.of_pixel[pixel];
        for (Int b = 0, r = pixel * blocks; b < blocks; ++b, ++r) {
            Channel* single = events.single.get() + begin;
            Several* several = events.several.get() + begin;
            const Int last = std::min(C, (b + 1) * block);
            for (Int c = b * block; c < last; c += AT_ONCE) {
                const std::uint8_t* from = x + pixel * C + c;
                const Int n = std::min(AT_ONCE, last - c);
                std::uint64_t singles, severals;
                Some(from, n).split(singles, severals);
                single += write_places(singles, [=](Int i, Int at) { single[i] = static_cast<Channel>(c + at); });
                several += write_places(severals, [=](Int i, Int at) {
                    several[i] = {static_cast<Channel>(c + at), from[std::min(at, n - 1)]};
                });
            }
            events.begin[r] = begin;
            events.single_end[r] = single - events.single.get();
            events.several_end[r] = several - events.several.get();
            begin = std::max(events.single_end[r], events.several_end[r]) + SPARE;
        }
    }
    return events;
}

constexpr int OUTPUTS = 64;  // pixels whose sums stay in the first cache together
constexpr Int WEIGHTS = 49152;  // bytes of weights that are used for all of them before others are

// Input currents of OUTPUTS pixels and WIDTH channels, for weights of one type.
template <class Weight, int WIDTH>
struct Currents;

template <int WIDTH>
struct Currents<float, WIDTH> {
    static constexpr int LANES = std::min<int>(BYTES / sizeof(float), WIDTH), N = WIDTH / LANES;
    using V = typename Vector<float, LANES>::type;
    float sum[OUTPUTS][WIDTH];

    void begin(Int o, const float* bias) {
        for (int i = 0; i < WIDTH; ++i) sum[o][i] = bias == nullptr ? 0 : bias[i];
    }

    void add(Int o, const float* weights, const Channel* single, const Channel* end, const Several* several,
             const Several* several_end) {
        V sums[N];
        for (int i = 0; i < N; ++i) sums[i] = vector_at<V>(sum[o] + i * LANES);
        for (; single < end; ++single)
            for (int i = 0; i < N; ++i) sums[i] += vector_at<V>(weights + *single * WIDTH + i * LANES);
        for (; several < several_end; ++several)
            for (int i = 0; i < N; ++i)
                sums[i] += vector_at<V>(weights + several->channel * WIDTH + i * LANES) * static_cast<float>(several->times);
        for (int i = 0; i < N; ++i) std::memcpy(sum[o] + i * LANES, &sums[i], sizeof(V));
    }
    void add_sum(Int o, Int of) {
        for (int i = 0; i < WIDTH; ++i) sum[o][i] += sum[of][i];
    }
    void store(Int o, float* out, const float*, const float*) { std::memcpy(out, sum[o], sizeof sum[o]); }
};

// 8-bit weights, to which 128 was added: none is negative. A pair of bytes, one word, has the weights of two channels,
// the lower one of the tile's first half and the upper one of its second. Words are added up as they are, and once more
// shifted down to their upper byte: that is the sum of the upper weights, and what is left of the first that of the
// lower ones. So half as much comes from the cache as with words for weights. Of so many weights neither overflows.
template <int WIDTH>
struct Currents<std::uint8_t, WIDTH> {
    static constexpr Int MOST = 65535 / 255;
    static constexpr int PAIRS = WIDTH / 2;
    static constexpr int LANES = std::min<int>(BYTES / sizeof(std::uint16_t), PAIRS), N = PAIRS / LANES;
    using V = typename Vector<std::uint16_t, LANES>::type;
    std::uint16_t words[OUTPUTS][PAIRS], upper[OUTPUTS][PAIRS];
    Int pending[OUTPUTS];  // spikes in these sums
    std::int32_t total[OUTPUTS][WIDTH];
    Int spikes[OUTPUTS];  // in the total; each has added 128 too much to it

    void begin(Int o, const float*) {
        std::memset(words[o], 0, sizeof words[o]);
        std::memset(upper[o], 0, sizeof upper[o]);
        pending[o] = spikes[o] = 0;
    }
    void flush(Int o) {
        if (spikes[o] == 0) std::memset(total[o], 0, sizeof total[o]);
        for (int i = 0; i < PAIRS; ++i) {
            total[o][i] += static_cast<std::uint16_t>(words[o][i] - (upper[o][i] << 8));
            total[o][PAIRS + i] += upper[o][i];
        }
        spikes[o] += pending[o];
        std::memset(words[o], 0, sizeof words[o]);
        std::memset(upper[o], 0, sizeof upper[o]);
        pending[o] = 0;
    }
    void add(Int o, const std::uint8_t* weights, const Channel* single, const Channel* end, const Several* several,
             const Several* several_end) {
        while (single < end || several < several_end) {
            const Channel* stop = std::min(end, single + (MOST - pending[o]));
            pending[o] += stop - single;
            const Several* several_stop = several;
            for (; several_stop < several_end && pending[o] + several_stop->times <= MOST; ++several_stop)
                pending[o] += several_stop->times;
            V word[N], up[N];
            for (int i = 0; i < N; ++i) word[i] = vector_at<V>(words[o] + i * LANES);
            for (int i = 0; i < N; ++i) up[i] = vector_at<V>(upper[o] + i * LANES);
            for (; single + 3 < stop; single += 4) {  // several at once: the loop itself costs as much as one of them
                for (int i = 0; i < N; ++i) {
                    const std::uint8_t* from = weights + i * BYTES_OF_V;
                    const V a = vector_at<V>(from + Int(single[0]) * WIDTH), b = vector_at<V>(from + Int(single[1]) * WIDTH);
                    const V c = vector_at<V>(from + Int(single[2]) * WIDTH), d = vector_at<V>(from + Int(single[3]) * WIDTH);
                    word[i] += (a + b) + (c + d);
                    up[i] += ((a >> 8) + (b >> 8)) + ((c >> 8) + (d >> 8));
                }
            }
            for (; single < stop; ++single) {
                for (int i = 0; i < N; ++i) {
                    const V weight = vector_at<V>(weights + Int(*single) * WIDTH + i * BYTES_OF_V);
                    word[i] += weight;
                    up[i] += weight >> 8;
                }
            }
            for (; several < several_stop; ++several) {
                for (int i = 0; i < N; ++i) {
                    const V weight = vector_at<V>(weights + Int(several->channel) * WIDTH + i * BYTES_OF_V);
                    word[i] += weight * several->times;
                    up[i] += (weight >> 8) * several->times;
                }
            }
            for (int i = 0; i < N; ++i) std::memcpy(words[o] + i * LANES, &word[i], sizeof(V));
            for (int i = 0; i < N; ++i) std::memcpy(upper[o] + i * LANES, &up[i], sizeof(V));
            if (single < end || several < several_end) flush(o);
        }
    }
    void add_sum(Int o, Int of) {
        flush(o);
        flush(of);
        for (int i = 0; i < WIDTH; ++i) total[o][i] += total[of][i];
        spikes[o] += spikes[of];
    }
    void store(Int o, float* out, const float* bias, const float* scale) {
        if (spikes[o] > 0) flush(o);
        const auto excess = static_cast<std::int32_t>(128 * (spikes[o] + pending[o]));
        if (spikes[o] > 0) {
            for (int i = 0; i < WIDTH; ++i) out[i] = static_cast<float>(total[o][i] - excess) * scale[i] + bias[i];
            return;
        }
        for (int i = 0; i < PAIRS; ++i) {
            const std::int32_t lower = static_cast<std::uint16_t>(words[o][i] - (upper[o][i] << 8)) - excess;
            out[i] = static_cast<float>(lower) * scale[i] + bias[i];
        }
        for (int i = PAIRS; i < WIDTH; ++i)
            out[i] = static_cast<float>(upper[o][i - PAIRS] - excess) * scale[i] + bias[i];
    }

   private:
    static constexpr int BYTES_OF_V = LANES * sizeof(std::uint16_t);
};

// Where currents go: to memory, rounded or not, or into neurons, whose spikes are added to `sums` if there are any. Steps of
// sums and spikes lie so far apart. Neurons continue from the potentials `before` and leave theirs in `after`, if there are
// any; both may be the same.
struct Target {
    float* currents;
    BFloat16* rounded_currents;
    const Neuron* neuron;
    const std::uint8_t* sums;
    Int sums_step;
    std::uint8_t* spikes;
    Int spikes_step;
    const float* before;
    float* after;
};

// From sums over the neurons that fire at every k-th step, for each k, to those over all that fire at a step.
template <class Sums>
void sum_up_periods(Sums& currents, Int T, Int positions) {
    for (Int t = T; t > 1; --t)
        for (Int k = 1; k <= t / 2; ++k)
            if (t % k == 0)
                for (Int p = 0; p < positions; ++p) currents.add_sum((t - 1) * positions + p, (k - 1) * positions + p);
}

template <int WIDTH, class Sums>
void fire(Sums& currents, const float* bias, const float* scale, Int T, Int positions, Int at, Int C_out,
          const Target& to) {
    for (Int p = 0; p < positions; ++p, at += C_out) {
        float x[WIDTH], v[WIDTH] = {};
        std::int32_t fired[WIDTH];
        if (to.before != nullptr) std::copy_n(to.before + at, WIDTH, v);
        for (Int t = 0; t < T; ++t) {
            currents.store(t * positions + p, x, bias, scale);
            step(x, v, fired, WIDTH, *to.neuron);
            std::uint8_t* out = to.spikes + t * to.spikes_step + at;
            if (to.sums == nullptr) {
                for (int i = 0; i < WIDTH; ++i) out[i] = static_cast<std::uint8_t>(fired[i]);
            } else {
                const std::uint8_t* from = to.sums + t * to.sums_step + at;
                for (int i = 0; i < WIDTH; ++i) out[i] = static_cast<std::uint8_t>(from[i] + fired[i]);
            }
        }
        if (to.after != nullptr) std::copy_n(v, WIDTH, to.after + at);
    }
}

// A convolution: what it takes, and how large that is.
struct Shape {
    Int M, H, W, C, C_out, side, stride;

    Int height() const { return (H - 1) / stride + 1; }
    Int width() const { return (W - 1) / stride + 1; }
};

// Outputs whose sums are computed together: T steps of some positions.
struct Outputs {
    Int n;
    Int image[OUTPUTS], top[OUTPUTS], left[OUTPUTS];  // of the pixels that an output sees, the first

    Outputs(const Shape& shape, Int T, Int all_positions, Int first, Int positions) : n(T * positions) {
        for (Int o = 0, t = 0; t < T; ++t) {
            const Int at = t * all_positions + first, W = shape.width();
            Int m = at / W / shape.height(), row = at / W % shape.height(), column = at % W;
            for (Int p = 0; p < positions; ++p, ++o) {
                image[o] = m * shape.H;
                top[o] = row * shape.stride - shape.side / 2;
                left[o] = column * shape.stride - shape.side / 2;
                if (++column < W) continue;
                column = 0;
                if (++row < shape.height()) continue;
                row = 0;
                ++m;
            }
        }
    }

    // The pixel at a place of an output's kernel; -1 beyond the border.
    Int pixel(const Shape& shape, Int o, Int i, Int j) const {
        const Int row = top[o] + i, column = left[o] + j;
        if (row < 0 || row >= shape.H || column < 0 || column >= shape.W) return -1;
        return (image[o] + row) * shape.W + column;
    }
};

// Place by place and block by block: their weights are in the first cache then.
template <int WIDTH, class Weight, class Sums>
void add_events(Sums& sums, const Outputs& outputs, const Events& events, const Weight* weights, const Shape& shape,
                Int blocks) {
    for (Int i = 0; i < shape.side; ++i) {
        for (Int j = 0; j < shape.side; ++j, weights += shape.C * WIDTH) {
            for (Int block = 0; block < blocks; ++block) {
                for (Int o = 0; o < outputs.n; ++o) {
                    const Int pixel = outputs.pixel(shape, o, i, j);
                    if (pixel < 0) continue;
                    const Int r = pixel * blocks + block;
                    sums.add(o, weights, events.single.get() + events.begin[r],
                             events.single.get() + events.single_end[r], events.several.get() + events.begin[r],
                             events.several.get() + events.several_end[r]);
                }
            }
        }
    }
}

// T steps of a position are computed by the same thread; T is 1 where a step does not depend on others. Where `periodic`,
// neurons fire at every k-th step, and x has the first spikes alone: at step k those of period k.
template <class Weight, int WIDTH>
void convolve_as(const std::uint8_t* x, const Weight* weight, const float* bias, const float* scale, const Target& to,
                 Int T, bool periodic, const Shape& shape, int threads) {
    const Int all_positions = shape.M / T * shape.height() * shape.width(), most = OUTPUTS / T;
    const Int chunks = (all_positions + most - 1) / most;
    const Int places = shape.side * shape.side, C_out = shape.C_out;
    const Int block = WEIGHTS / static_cast<Int>(WIDTH * sizeof(Weight));
    const Int blocks = (shape.C + block - 1) / block;
    const Events& events = list_events(x, shape.M * shape.H * shape.W, shape.C, block, threads);
    const Int additions = events.total * places / (shape.stride * shape.stride) * C_out;
    const int adding = worth(additions / ADDITIONS + T * all_positions * C_out, threads);
#pragma omp parallel for collapse(2) num_threads(adding) schedule(static)
    for (Int tile = 0; tile < C_out / WIDTH; ++tile) {
        for (Int chunk = 0; chunk < chunks; ++chunk) {
            const Int start = tile * WIDTH, first = chunk * most, positions = std::min(most, all_positions - first);
            const Outputs outputs(shape, T, all_positions, first, positions);
            alignas(64) Currents<Weight, WIDTH> currents;
            for (Int o = 0; o < outputs.n; ++o)  // each step has a share of the first
                currents.begin(o, periodic && o >= positions ? nullptr : bias + start);
            add_events<WIDTH>(currents, outputs, events, weight + start * places * shape.C, shape, blocks);
            if (periodic) sum_up_periods(currents, T, positions);
            if (to.neuron != nullptr) {
                fire<WIDTH>(currents, bias + start, scale + start, T, positions, first * C_out + start, C_out, to);
            } else {
                for (Int o = 0; o < outputs.n; ++o) {
                    const Int at = (o / positions * all_positions + first + o % positions) * C_out + start;
                    if (to.currents != nullptr) {
                        currents.store(o, to.currents + at, bias + start, scale + start);
                    } else {
                        float values[WIDTH];
                        currents.store(o, values, bias + start, scale + start);
                        for (int i = 0; i < WIDTH; ++i) to.rounded_currents[at + i] = rounded(values[i]);
                    }
                }
            }
        }
    }
}

template <class Weight>
void convolve(const std::uint8_t* x, const Weight* weight, const float* bias, const float* scale, const Target& to,
              Int T, bool periodic, Int M, Int H, Int W, Int C, Int C_out, Int side, Int stride, Int width, int threads) {
    const auto run = width == 64   ? convolve_as<Weight, 64>
                     : width == 32 ? convolve_as<Weight, 32>
                                   : convolve_as<Weight, 16>;
    run(x, weight, bias, scale, to, T, periodic, Shape{M, H, W, C, C_out, side, stride}, threads);
}

}  // namespace

// A kernel of side x side with as much padding as keeps the size. `width` is that of the weights' tiles. The first gives
// currents [M, H', W', C'], in one of the two types; with `periods` above one, M is this many steps of neurons that fire at
// every k-th, and x has their first spikes. The second gives the spikes of neurons, which takes M = T B. Both: up to 64 steps.
#define CONVOLVE(NAME, WEIGHT)                                                                                        \
    EXPORT void convolve_##NAME(const std::uint8_t* x, const WEIGHT* weight, const float* bias, const float* scale,   \
                                Int M, Int H, Int W, Int C, Int C_out, Int side, Int stride, Int width, Int periods,  \
                                float* out, BFloat16* rounded_out, int threads) {                                     \
        const Target to{out, rounded_out, nullptr, nullptr, 0, nullptr, 0, nullptr, nullptr};                         \
        convolve(x, weight, bias, scale, to, periods, periods > 1, M, H, W, C, C_out, side, stride, width, threads);  \
    }                                                                                                                 \
    EXPORT void convolve_fire_##NAME(const std::uint8_t* x, const WEIGHT* weight, const float* bias,                  \
                                     const float* scale, Int M, Int H, Int W, Int C, Int C_out, Int side, Int stride, \
                                     Int width, Int T, const Neuron* neuron, const std::uint8_t* sums,                \
                                     Int sums_step, std::uint8_t* spikes, Int spikes_step, const float* before,       \
                                     float* after, int threads) {                                                     \
        const Target to{nullptr, nullptr, neuron, sums, sums_step, spikes, spikes_step, before, after};               \
        convolve(x, weight, bias, scale, to, T, false, M, H, W, C, C_out, side, stride, width, threads);              \
    }

CONVOLVE(float32, float)
CONVOLVE(int8, std::uint8_t)
