// Attention of tokens over keys and values that lie anywhere in a table, and its gradients.
//
// A token's context is a list of rows of the table: its conversation in an engine's pool, or the
// path that leads to it in a learner's trie. So conversations share keys and values, and nothing is
// gathered, padded or masked.
//
// Every token's result has the same bits, whatever other tokens a call has and on how many threads:
// a sum over a head's width and one over the context are always added up in the same order.
// Gradients of keys and values are sums over tokens, which each thread adds up for itself first.
//
// Plain C++17 with the vector extensions that GCC and Clang share.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int QUERIES = 16;  // tokens of one conversation that are worked on together

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Vec load(const float* at) {
    Vec out;
    std::memcpy(&out, at, sizeof out);
    return out;
}

inline Vec load(const uint16_t* at) {  // bf16
    Halves half;
    std::memcpy(&half, at, sizeof half);
    return (Vec)(__builtin_convertvector(half, Ints) << 16);
}

inline void store(float* at, Vec value) { std::memcpy(at, &value, sizeof value); }

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// Sums of neighbours in `a`, then of those in `b`.
inline Vec add_pairs(Vec a, Vec b) {
#ifdef __AVX512F__
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    return SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) + SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

// Sums of N vectors, one per lane.
template <int N>
inline Vec sums(const Vec* a) {
    Vec half[N / 2];
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; i++) half[i] = add_pairs(a[2 * i], a[2 * i + 1]);
    if constexpr (N == 2)
        return half[0];
    else
        return sums<N / 2>(half);
}

// Add to LANES sums the products of V vectors at `x` with those of LANES rows.
template <int V>
inline void add_products(Vec* sum, const float* x, const float* const* rows, int64_t at) {
    Vec part[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) part[v] = load(x + at + v * LANES);
#pragma GCC unroll 16
    for (int l = 0; l < LANES; l++) {
        const float* row = rows[l] + at;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[l] += part[v] * load(row + v * LANES);
    }
}

// Products of the vector `x` with each of LANES rows of `width`.
inline Vec dots(const float* x, const float* const* rows, int64_t width) {
    Vec sum[LANES] = {};
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) add_products<4>(sum, x, rows, d);
    for (; d + 2 * LANES <= width; d += 2 * LANES) add_products<2>(sum, x, rows, d);
    for (; d < width; d += LANES) add_products<1>(sum, x, rows, d);
    return sums<LANES>(sum);
}

// Add `count` rows, each times its weight, to V vectors at `out`.
template <int V>
inline void add_rows(float* out, const float* weights, const float* const* rows, int count,
                     int64_t at) {
    Vec sum[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) sum[v] = load(out + at + v * LANES);
    for (int l = 0; l < count; l++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sum[v] += weights[l] * load(rows[l] + at + v * LANES);
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(out + at + v * LANES, sum[v]);
}

inline void add_weighted(float* out, const float* weights, const float* const* rows, int count,
                         int64_t width) {
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES) add_rows<4>(out, weights, rows, count, d);
    for (; d + 2 * LANES <= width; d += 2 * LANES) add_rows<2>(out, weights, rows, count, d);
    for (; d < width; d += LANES) add_rows<1>(out, weights, rows, count, d);
}

// Add to a vector of each of `count` rows of a table the `n` vectors of x, with each its weights.
inline void add_outer(float* table, const int64_t* where, int count, const float* weights,
                      const float* x, int64_t stride, int64_t n) {
    Vec sum[LANES] = {};
    for (int64_t i = 0; i < n; i++) {
        const Vec part = load(x + i * stride);
#pragma GCC unroll 16
        for (int l = 0; l < LANES; l++) sum[l] += weights[i * LANES + l] * part;
    }
    for (int l = 0; l < count; l++) store(table + where[l], load(table + where[l]) + sum[l]);
}

// e^x for x <= 0, to a unit or two in the last place; 0 below -87. The polynomial is that of expf
// in Cephes (Moshier, https://www.netlib.org/cephes).
inline Vec exponential(Vec x) {
    Ints tiny = x < -87.0f;
    x = tiny ? Vec{} - 87.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Vec whole = (x * 1.44269504f + magic) - magic;
    Vec f = x - whole * 0.693359375f;
    f = f - whole * -2.12194440e-4f;
    Vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
    p = p * (Vec)power;
    return tiny ? Vec{} : p;
}

inline Ints lanes() {
    Ints out;
    for (int l = 0; l < LANES; l++) out[l] = l;
    return out;
}

struct Context {  // of a call; see attention.py
    const int32_t* rows;
    const int64_t *slots, *positions;
    int64_t columns, kv_heads, group, width;
    float scale;
};

// Where the rows of a context of n are in the table, in numbers; beyond the last, that one again.
inline void locate(std::vector<int64_t>& at, const int32_t* rows, int64_t n, int64_t stride) {
    for (int64_t j = 0; j < n; j++) at[j] = rows[j] * stride;
    std::fill_n(at.begin() + n, LANES, at[n - 1]);
}

// LANES keys or values of one head, as fp32.
struct Tile {
    const float* at[LANES];
    std::vector<float> own;  // of what is kept in another format
    int64_t width;

    explicit Tile(int64_t width) : own(LANES * width), width(width) {}

    void find(const float* table, const int64_t* where) {
        for (int l = 0; l < LANES; l++) at[l] = table + where[l];
    }

    void find(const uint16_t* table, const int64_t* where) {
        for (int l = 0; l < LANES; l++) {
            const uint16_t* row = table + where[l];
            float* copy = &own[l * width];
            for (int64_t d = 0; d < width; d += LANES) store(copy + d, load(row + d));
            at[l] = copy;
        }
    }
};

// Fetch LANES rows into the cache.
template <typename T>
inline void fetch(const T* table, const int64_t* where, int64_t width) {
    for (int l = 0; l < LANES; l++)
        for (int64_t d = 0; d < width; d += 64 / (int64_t)sizeof(T))
            __builtin_prefetch(table + where[l] + d);
}

// The end of a run of at most QUERIES tokens of one conversation that begins at `t`; the last of
// them sees most.
inline int64_t run_end(const Context& c, int64_t t, int64_t end) {
    int64_t next = t + 1;
    while (next < end && next < t + QUERIES && c.slots[next] == c.slots[t] &&
           c.positions[next] > c.positions[next - 1])
        next++;
    return next;
}

// Turn n scores into weights that add up to the sum that is returned; `largest` is the highest.
inline float soften(float* w, int64_t n, float& largest) {
    const int64_t padded = (n + LANES - 1) / LANES * LANES;
    std::fill(w + n, w + padded, -INFINITY);
    Vec most = load(w), total = {};
    for (int64_t j = LANES; j < padded; j += LANES) {
        Vec x = load(w + j);
        most = x > most ? x : most;
    }
    largest = most[0];
    for (int l = 1; l < LANES; l++) largest = std::max(largest, most[l]);
    for (int64_t j = 0; j < padded; j += LANES) {
        Vec e = exponential(load(w + j) - largest);
        store(w + j, e);
        total += e;
    }
    float sum = 0;
    for (int l = 0; l < LANES; l++) sum += total[l];
    return sum;
}

template <typename T>
void forward(const Context& c, const float* query, const T* keys, const T* values, float* out,
             float* normalizers, int64_t begin, int64_t end) {
    const int64_t stride = c.kv_heads * c.width, heads = c.kv_heads * c.group, width = c.width;
    const int64_t most = QUERIES * c.group;
    int64_t longest = 0;
    for (int64_t t = begin; t < end; t++) longest = std::max(longest, c.positions[t] + 1);
    const int64_t room = (longest + LANES - 1) / LANES * LANES;  // of a query's weights
    std::vector<float> weights(room * most), scaled(width * most);
    std::vector<int64_t> place(most), seen(most), where(room + LANES);
    Tile tile(width);
    for (int64_t t = begin, next; t < end; t = next) {
        next = run_end(c, t, end);
        const int64_t queries = (next - t) * c.group, n = c.positions[next - 1] + 1;
        locate(where, c.rows + c.slots[t] * c.columns, n, stride);
        for (int64_t kv = 0; kv < c.kv_heads; kv++) {
            for (int64_t i = 0; i < queries; i++) {
                const int64_t token = t + i / c.group;
                place[i] = token * heads + kv * c.group + i % c.group;
                seen[i] = c.positions[token] + 1;
                const float* q = query + place[i] * width;
                for (int64_t d = 0; d < width; d += LANES)
                    store(&scaled[i * width + d], load(q + d) * c.scale);
            }
            for (int64_t j = 0; j < n; j += LANES) {
                if (j + LANES < n) fetch(keys + kv * width, &where[j + LANES], width);
                tile.find(keys + kv * width, &where[j]);
                for (int64_t i = 0; i < queries; i++)
                    store(&weights[i * room + j], dots(&scaled[i * width], tile.at, width));
            }
            for (int64_t i = 0; i < queries; i++) {
                float largest, sum = soften(&weights[i * room], seen[i], largest);
                for (int64_t j = 0; j < seen[i]; j += LANES) {
                    float* w = &weights[i * room + j];
                    store(w, load(w) / sum);
                }
                if (normalizers) normalizers[place[i]] = largest + std::log(sum);
                std::fill_n(out + place[i] * width, width, 0.0f);
            }
            for (int64_t j = 0; j < n; j += LANES) {
                if (j + LANES < n) fetch(values + kv * width, &where[j + LANES], width);
                tile.find(values + kv * width, &where[j]);
                for (int64_t i = 0; i < queries; i++) {
                    const int64_t count = std::min<int64_t>(LANES, seen[i] - j);
                    if (count > 0)
                        add_weighted(out + place[i] * width, &weights[i * room + j], tile.at,
                                     (int)count, width);
                }
            }
        }
    }
}

// Gradients of one key head. With s the scores, p = exp(s - normalizer) and dp the products of the
// output's gradient with the values: ds = p (dp - d), d the product of output and its gradient.
void backward(const Context& c, const float* query, const float* keys, const float* values,
              const float* out, const float* normalizers, const float* of_out, float* of_query,
              float* of_keys, float* of_values, int64_t begin, int64_t end, int64_t kv) {
    const int64_t stride = c.kv_heads * c.width, heads = c.kv_heads * c.group, width = c.width;
    const int64_t most = QUERIES * c.group;
    std::vector<float> scaled(most * width), of_scaled(most * width), grads(most * width);
    std::vector<float> p(most * LANES), ds(most * LANES), product(most);
    std::vector<int64_t> place(most), where(c.columns + LANES);
    Tile key(width), value(width);
    const Ints lane = lanes();
    for (int64_t t = begin, next; t < end; t = next) {
        next = run_end(c, t, end);
        const int64_t queries = (next - t) * c.group, n = c.positions[next - 1] + 1;
        locate(where, c.rows + c.slots[t] * c.columns, n, stride);
        for (int64_t i = 0; i < queries; i++) {
            place[i] = (t + i / c.group) * heads + kv * c.group + i % c.group;
            const float *q = query + place[i] * width, *o = out + place[i] * width,
                        *g = of_out + place[i] * width;
            Vec sum = {};
            for (int64_t d = 0; d < width; d += LANES) {
                store(&scaled[i * width + d], load(q + d) * c.scale);
                store(&of_scaled[i * width + d], Vec{});
                store(&grads[i * width + d], load(g + d));
                sum += load(o + d) * load(g + d);
            }
            product[i] = 0;
            for (int l = 0; l < LANES; l++) product[i] += sum[l];
        }
        for (int64_t j = 0; j < n; j += LANES) {
            key.find(keys + kv * width, &where[j]);
            value.find(values + kv * width, &where[j]);
            for (int64_t i = 0; i < queries; i++) {
                Vec x = dots(&scaled[i * width], key.at, width) - normalizers[place[i]];
                Ints hidden = lane > (int32_t)(c.positions[t + i / c.group] - j);
                Vec weight = hidden ? Vec{} : exponential(x > 0.0f ? Vec{} : x);
                Vec of_weight = dots(&grads[i * width], value.at, width);
                store(&p[i * LANES], weight);
                store(&ds[i * LANES], weight * (of_weight - product[i]));
            }
            const int count = (int)std::min<int64_t>(LANES, n - j);
            for (int64_t i = 0; i < queries; i++)
                add_weighted(&of_scaled[i * width], &ds[i * LANES], key.at, count, width);
            for (int64_t d = 0; d < width; d += LANES) {
                float *of_key = of_keys + kv * width + d, *of_value = of_values + kv * width + d;
                add_outer(of_key, &where[j], count, ds.data(), &scaled[d], width, queries);
                add_outer(of_value, &where[j], count, p.data(), &grads[d], width, queries);
            }
        }
        for (int64_t i = 0; i < queries; i++)
            for (int64_t d = 0; d < width; d += LANES)
                store(of_query + place[i] * width + d, load(&of_scaled[i * width + d]) * c.scale);
    }
}

// Call `work(part)` for each of `parts` parts, on as many threads.
template <typename Work>
void spread(int64_t parts, Work work) {
    std::vector<std::thread> others;
    for (int64_t part = 1; part < parts; part++) {
        try {
            others.emplace_back(work, part);
        } catch (const std::system_error&) {  // as many as the system allows run already
            work(part);
        }
    }
    work(0);
    for (auto& one : others) one.join();
}

// Where each of `parts` parts of the tokens begins, and the last ends; each sees as many keys.
std::vector<int64_t> divide(const Context& c, int64_t tokens, int64_t parts) {
    std::vector<int64_t> seen(tokens + 1, 0), begins(parts + 1);  // keys that the tokens before see
    for (int64_t t = 0; t < tokens; t++) seen[t + 1] = seen[t] + c.positions[t] + 1;
    for (int64_t part = 0; part <= parts; part++)
        begins[part] = std::lower_bound(seen.begin(), seen.end(), seen[tokens] * part / parts) -
                       seen.begin();
    return begins;
}

}  // namespace

extern "C" {

int rayrl_lanes() { return LANES; }

void rayrl_attend(const Context* c, const float* query, const void* keys, const void* values,
                  int bf16, float* out, float* normalizers, int64_t tokens, int64_t threads) {
    const auto begins = divide(*c, tokens, threads);
    spread(threads, [&](int64_t part) {
        if (bf16)
            forward(*c, query, (const uint16_t*)keys, (const uint16_t*)values, out, normalizers,
                    begins[part], begins[part + 1]);
        else
            forward(*c, query, (const float*)keys, (const float*)values, out, normalizers,
                    begins[part], begins[part + 1]);
    });
}

void rayrl_attend_backward(const Context* c, const float* query, const float* keys,
                           const float* values, const float* out, const float* normalizers,
                           const float* of_out, float* of_query, float* of_keys, float* of_values,
                           int64_t tokens, int64_t table, int64_t threads) {
    const auto begins = divide(*c, tokens, threads);
    const int64_t size = table * c->kv_heads * c->width;
    std::vector<std::vector<float>> sums(2 * threads);  // of the keys and values by part
    spread(threads, [&](int64_t part) {
        float *of_k = of_keys, *of_v = of_values;
        if (part) {
            sums[2 * part].resize(size);
            sums[2 * part + 1].resize(size);
            of_k = sums[2 * part].data();
            of_v = sums[2 * part + 1].data();
        }
        for (int64_t kv = 0; kv < c->kv_heads; kv++)
            backward(*c, query, keys, values, out, normalizers, of_out, of_query, of_k, of_v,
                     begins[part], begins[part + 1], kv);
    });
    for (int64_t part = 1; part < threads; part++)
        for (int64_t i = 0; i < size; i++) {
            of_keys[i] += sums[2 * part][i];
            of_values[i] += sums[2 * part + 1][i];
        }
}
}
