// The gradients of convolutions' weights, event by event: each spike adds the gradients of the outputs that see it.
//
// Tensors are channels last: spikes and spike sums x [M, H, W, C] as bytes, gradients of currents [M, H, W, C'] in float32
// or bfloat16. Images are cut into chunks of pixels whose gradients stay in the second cache. In each of them events are
// listed by channel, so that a weight's gradient is summed up in registers over all pixels where its channel fired.
// What comes before this file is common.cpp.

#include <memory>
#include <vector>

#if !defined(__GNUC__)
#error "event-driven gradients need the vector extensions of GCC or Clang"
#endif

namespace {

constexpr Int PIXELS = 256;  // of a chunk, about

// How images are cut: into chunks of several whole images or, where these are large, of some rows of one.
struct Chunks {
    Int M, H, W, margin, rows, images, bands, count;

    Chunks(Int M, Int H, Int W, Int side) : M(M), H(H), W(W), margin(side / 2) {
        rows = std::min(H, std::max<Int>(1, PIXELS / W));
        images = rows == H ? std::min(M, std::max<Int>(1, PIXELS / (H * W))) : 1;
        bands = (H + rows - 1) / rows;
        count = (M + images - 1) / images * bands;
    }
};

// One of them. Its gradients have a margin around each image, so that there is one at every place of the kernel.
struct Chunk {
    Int first_image, last_image, first_row, last_row, width;

    Chunk(const Chunks& of, Int chunk) {
        first_image = chunk / of.bands * of.images;
        last_image = std::min(of.M, first_image + of.images);
        first_row = chunk % of.bands * of.rows;
        last_row = std::min(of.H, first_row + of.rows);
        width = of.W + 2 * of.margin;
    }
};

using Pixel = std::uint32_t;

struct Several {
    Pixel pixel;
    float times;
};

// Single spikes and sums of several. Those of channel c in chunk k begin at k C + c and end where the next ones begin. Their
// pixel, counted with margins, is the one at the upper left of their own by one margin: that which the last place sees.
struct Events {
    std::vector<Int> single_begin, several_begin;
    std::unique_ptr<Pixel[]> single;
    std::unique_ptr<Several[]> several;
};

template <class Event>
void for_each_event(const std::uint8_t* x, const Chunks& chunks, Int k, Int C, Event event) {
    const Chunk chunk(chunks, k);
    Int pixel = 0;
    for (Int m = chunk.first_image; m < chunk.last_image; ++m) {
        for (Int i = chunk.first_row; i < chunk.last_row; ++i, pixel += 2 * chunks.margin) {
            const std::uint8_t* row = x + (m * chunks.H + i) * chunks.W * C;
            for (Int j = 0; j < chunks.W; ++j, ++pixel, row += C) {
                for (Int c = 0; c < C; c += 8) {
                    std::uint64_t eight = 0;
                    std::memcpy(&eight, row + c, std::min<Int>(8, C - c));
                    while (eight != 0) {
                        const int bits = __builtin_ctzll(eight) & ~7;
                        event(c + bits / 8, static_cast<Pixel>(pixel), static_cast<std::uint8_t>(eight >> bits));
                        eight &= ~(std::uint64_t{255} << bits);
                    }
                }
            }
        }
        pixel += 2 * chunks.margin * chunk.width;
    }
}

// From numbers of events to where they begin, and one more for the end.
Int begin(std::vector<Int>& numbers) {
    Int total = 0;
    for (Int& number : numbers) {
        const Int of_these = number;
        number = total;
        total += of_these;
    }
    return total;
}

Events list_events(const std::uint8_t* x, const Chunks& chunks, Int C, int threads) {
    Events events;
    events.single_begin.resize(chunks.count * C + 1);
    events.several_begin.resize(chunks.count * C + 1);
    const int listing = worth(chunks.M * chunks.H * chunks.W * C, threads);
#pragma omp parallel for num_threads(listing) schedule(static)
    for (Int k = 0; k < chunks.count; ++k) {
        Int* singles = events.single_begin.data() + k * C;
        Int* severals = events.several_begin.data() + k * C;
        for_each_event(x, chunks, k, C, [=](Int c, Pixel, int times) { ++(times == 1 ? singles : severals)[c]; });
    }
    events.single.reset(new Pixel[begin(events.single_begin)]);
    events.several.reset(new Several[begin(events.several_begin)]);
#pragma omp parallel for num_threads(listing) schedule(static)
    for (Int k = 0; k < chunks.count; ++k) {
        std::vector<Int> single(events.single_begin.begin() + k * C, events.single_begin.begin() + (k + 1) * C);
        std::vector<Int> several(events.several_begin.begin() + k * C, events.several_begin.begin() + (k + 1) * C);
        for_each_event(x, chunks, k, C, [&](Int c, Pixel pixel, int times) {
            if (times == 1)
                events.single[single[c]++] = pixel;
            else
                events.several[several[c]++] = {pixel, static_cast<float>(times)};
        });
    }
    return events;
}

// Gradients of WIDTH output channels in a chunk, with margins of zeros at the images' borders.
template <int WIDTH, class Gradient>
void copy_with_margins(const Gradient* grad, const Chunks& chunks, Int k, Int C_out, float* to) {
    const Chunk chunk(chunks, k);
    for (Int m = chunk.first_image; m < chunk.last_image; ++m) {
        for (Int i = chunk.first_row - chunks.margin; i < chunk.last_row + chunks.margin; ++i) {
            for (Int j = -chunks.margin; j < chunks.W + chunks.margin; ++j, to += WIDTH) {
                if (i < 0 || i >= chunks.H || j < 0 || j >= chunks.W) {
                    std::fill_n(to, WIDTH, 0.0f);
                } else {
                    const Gradient* from = grad + ((m * chunks.H + i) * chunks.W + j) * C_out;
                    for (int o = 0; o < WIDTH; ++o) to[o] = load(from[o]);
                }
            }
        }
    }
}

// Adds a chunk's gradients of the weights to WIDTH output channels to `total` [k k, C, WIDTH].
template <int WIDTH>
void add_chunk(const float* grad, const Events& events, const Chunks& chunks, Int k, Int C, Int side, float* total) {
    constexpr int LANES = std::min<int>(BYTES / sizeof(float), WIDTH), N = WIDTH / LANES;
    using V = typename Vector<float, LANES>::type;
    const auto at = [](const float* from, int i) { return vector_at<V>(from + i * LANES); };
    const Int width = Chunk(chunks, k).width;
    for (Int c = 0; c < C; ++c) {
        const Int of_channel = k * C + c;
        const Pixel* first = events.single.get() + events.single_begin[of_channel];
        const Pixel* last = events.single.get() + events.single_begin[of_channel + 1];
        const Several* first_several = events.several.get() + events.several_begin[of_channel];
        const Several* last_several = events.several.get() + events.several_begin[of_channel + 1];
        if (first == last && first_several == last_several) continue;
        for (Int place = 0; place < side * side; ++place) {
            const float* from = grad + ((side - 1 - place / side) * width + side - 1 - place % side) * WIDTH;
            V sums[N] = {};
            const Pixel* e = first;
            for (; e + 3 < last; e += 4) {  // sums of their own: an addition waits for no other one
                const float *p = from + Int(e[0]) * WIDTH, *q = from + Int(e[1]) * WIDTH;
                const float *r = from + Int(e[2]) * WIDTH, *s = from + Int(e[3]) * WIDTH;
                for (int i = 0; i < N; ++i) sums[i] += (at(p, i) + at(q, i)) + (at(r, i) + at(s, i));
            }
            for (; e < last; ++e)
                for (int i = 0; i < N; ++i) sums[i] += at(from + Int(*e) * WIDTH, i);
            for (const Several* s = first_several; s < last_several; ++s)
                for (int i = 0; i < N; ++i) sums[i] += at(from + Int(s->pixel) * WIDTH, i) * s->times;
            float* to = total + (place * C + c) * WIDTH;
            for (int i = 0; i < N; ++i) {
                const V sum = at(to, i) + sums[i];
                std::memcpy(to + i * LANES, &sum, sizeof sum);
            }
        }
    }
}

template <int WIDTH, class Gradient>
void weight_gradient(const std::uint8_t* x, const Gradient* grad, Int M, Int H, Int W, Int C, Int C_out, Int side,
                     Int parts, float* out, int threads) {
    const Chunks chunks(M, H, W, side);
    const Events events = list_events(x, chunks, C, threads);
    const Int tiles = C_out / WIDTH, size = side * side * C * WIDTH;
    const Int found = events.single_begin.back() + events.several_begin.back();
    const int adding = worth(found * side * side * C_out / ADDITIONS, threads);
    const Int pixels = chunks.images * (chunks.rows + 2 * chunks.margin) * (W + 2 * chunks.margin);
#pragma omp parallel num_threads(adding)
    {
        const std::unique_ptr<float[]> local(new float[pixels * WIDTH]);
#pragma omp for collapse(2) schedule(dynamic)
        for (Int part = 0; part < parts; ++part) {
            for (Int tile = 0; tile < tiles; ++tile) {
                float* total = out + (part * tiles + tile) * size;
                std::fill_n(total, size, 0.0f);
                for (Int k = chunks.count * part / parts; k < chunks.count * (part + 1) / parts; ++k) {
                    copy_with_margins<WIDTH>(grad + tile * WIDTH, chunks, k, C_out, local.get());
                    add_chunk<WIDTH>(local.get(), events, chunks, k, C, side, total);
                }
            }
        }
    }
}

}  // namespace

// Gradients [M, H, W, C'] of the currents that a convolution makes of x, with as much padding as keeps the size, to those of
// its weights, [parts, C' / width, k k, C, width]: each part has its share of the chunks, and the parts are to be added up.
// Which spikes are added in which order depends on neither threads nor tiles.
#define WEIGHT_GRADIENT(NAME, GRADIENT)                                                                                \
    EXPORT void weight_gradient_##NAME(const std::uint8_t* x, const GRADIENT* grad, Int M, Int H, Int W, Int C,        \
                                       Int C_out, Int side, Int width, Int parts, float* out, int threads) {           \
        const auto run = width == 64   ? weight_gradient<64, GRADIENT>                                                 \
                         : width == 32 ? weight_gradient<32, GRADIENT>                                                 \
                                       : weight_gradient<16, GRADIENT>;                                                \
        run(x, grad, M, H, W, C, C_out, side, parts, out, threads);                                                    \
    }

WEIGHT_GRADIENT(float32, float)
WEIGHT_GRADIENT(bfloat16, BFloat16)
