/* Attention of rows of packed queries over keys in blocks, for x86 CPUs.

   Knows neither models nor passes: simd.py says where queries, keys and values lie, and compiles this file for AVX2 in
   float32, for AVX-512 in float32, or (BFLOAT16) for AVX512_BF16. Scores and outputs are accumulated in float32; in
   bfloat16 the weights are rounded before they multiply values, as torch's own kernel does.

   A task is one row and one kv head, with a part of the queries that share it. It brings keys and values into the
   order in which they are multiplied, in units of 32 bits (one float32, or two bfloat16 side by side):

       keys     [n / PANEL][dim / UNIT][PANEL]                  of PANEL keys, the units of one place after another
       values   [n / CHUNK][dim / LANES][CHUNK / UNIT][LANES]   of UNIT keys, the elements of LANES places

   and goes over them with TILE queries at a time, in chunks whose scores stay in the first cache. Where that is all of
   its queries, as in decode, each chunk takes the place of the one before. */

#include "vector.h"

#ifdef __AVX512F__
enum { TILE = 12 }; /* 24 of 32 registers are sums */
#else
enum { TILE = 6 }; /* 12 of 16 */
#endif

enum { PANEL = 2 * LANES, CHUNK = 256, MAX_DIM = 256 };

typedef struct {
    const element *q, *k, *v;
    element *out;                            /* [queries, heads, dim], contiguous */
    int64_t q_row, q_head, kv_row, kv_head;  /* strides, in elements */
    const int32_t *query_ends;               /* [rows + 1]: row i has the queries [query_ends[i], query_ends[i + 1]) */
    const int32_t *key_counts;               /* [rows] */
    const int32_t *blocks;                   /* [rows, blocks_per_row]: the row of k and v where each block starts */
    int64_t blocks_per_row, block_size;      /* a multiple of LANES, or a row has one block */
    int64_t rows, kv_heads, group, dim;      /* there are kv_heads * group heads; dim is a multiple of UNIT */
    int64_t causal;                          /* a row's last query sees all its keys, the one before one fewer */
    int64_t parts;                           /* in which the queries of a row are split */
    float scale;                             /* of scores as powers of 2 */
    char *workspace;                         /* for each thread, aligned to 64 bytes */
    int64_t workspace_size, packed_keys;     /* of one thread */
    int64_t threads_started, tasks_started;  /* 0 at first */
} Pass;

typedef struct {
    uint32_t queries[TILE][MAX_DIM / UNIT];
    float scores[TILE][CHUNK + LANES]; /* longer than a chunk, so that the rows do not share their place in the cache */
    uint32_t weights[TILE][CHUNK / UNIT + LANES];
    float out[TILE][MAX_DIM]; /* not yet divided by the sum of all weights */
    float largest[TILE], sum[TILE], shrink[TILE];
    int64_t seen[TILE]; /* how many keys each query sees */
} Tile;

/* How many keys are packed at once of rows with these many keys and queries (of all heads in a group) at most. */
int64_t packed_keys(int64_t most_keys, int64_t most_queries) {
    return most_queries > TILE ? round_up(most_keys, CHUNK) : CHUNK;
}

/* Of a thread. */
int64_t workspace_bytes(int64_t packed_keys, int64_t dim) {
    return round_up(sizeof(Tile), 64) + round_up(packed_keys * 4 / UNIT * (dim + round_up(dim, LANES)), 64);
}

/* sum + a * b, of bfloat16 the products of both elements of a unit. */
INLINE floats multiply(floats sum, uint32_t a, floats b) {
    units same = a + (units){0};
#ifdef BFLOAT16
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)same, (__m512bh)b);
#else
    return sum + (floats)same * b;
#endif
}

/* Two vectors of float32 as neighbouring elements. */
INLINE void store_elements(void *to, floats a, floats b) {
#ifdef BFLOAT16
    store(to, (floats)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    store(to, a);
    store((float *)to + LANES, b);
#endif
}

/* rows[i][j] becomes rows[j][i]. */
INLINE void transpose(floats rows[LANES]) {
#ifdef __AVX512F__
    __m512 *r = (__m512 *)rows, t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm512_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 16; j += 8) {
            t[i + j] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0x88);
            t[i + j + 4] = _mm512_shuffle_f32x4(r[i + j], r[i + j + 4], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    }
#else
    __m256 *r = (__m256 *)rows, t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            r[i + 2 * j] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0x44);
            r[i + 2 * j + 1] = _mm256_shuffle_ps(t[i + j], t[i + j + 2], 0xee);
        }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    memcpy(r, t, sizeof t);
#endif
}

static inline int64_t block_row(const Pass *p, int64_t row, int64_t key) {
    return p->blocks[row * p->blocks_per_row + key / p->block_size] + key % p->block_size;
}

/* The keys [first, first + count) of a head; the places of the last panel that have no key are zero. */
static void pack_keys(const Pass *p, int64_t row, int64_t head, int64_t first, int64_t count, uint32_t *to) {
    int64_t length = p->dim / UNIT;
    for (int64_t key = 0; key < round_up(count, PANEL); key += LANES) {
        int64_t found = least(LANES, count - key);
        const element *from = p->k + head * p->kv_head;
        if (found > 0) from += block_row(p, row, first + key) * p->kv_row;
        uint32_t *panel = to + key / PANEL * length * PANEL + key % PANEL;
        for (int64_t place = 0; place < length; place += LANES) {
            int64_t width = least(LANES, length - place);
            floats rows[LANES];
            for (int64_t i = 0; i < LANES; i++) {
                const element *one = from + i * p->kv_row + place * UNIT;
                int64_t size = i < found ? width : 0;
                rows[i] = size == LANES ? load(one) : load_some(one, size * UNIT);
            }
            transpose(rows);
            for (int64_t i = 0; i < width; i++) store(panel + (place + i) * PANEL, rows[i]);
        }
    }
}

static void pack_values(const Pass *p, int64_t row, int64_t head, int64_t first, int64_t count, uint32_t *to) {
    int64_t step = LANES * (CHUNK / UNIT);
    for (int64_t key = 0; key < round_up(count, LANES); key += LANES) {
        const element *from = p->v + block_row(p, row, first + key) * p->kv_row + head * p->kv_head;
        for (int64_t i = 0; i < LANES; i += UNIT, from += UNIT * p->kv_row) {
            uint32_t *unit = to + (key + i) / UNIT * LANES;
            for (int64_t place = 0; place < p->dim; place += LANES) {
                int64_t width = least(LANES, p->dim - place);
#ifdef BFLOAT16
                __mmask16 mask = (__mmask16)((1u << width) - 1);
                __mmask16 low_mask = key + i < count ? mask : 0, high_mask = key + i + 1 < count ? mask : 0;
                __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low_mask, from + place));
                __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high_mask, from + p->kv_row + place));
                store(unit, (floats)_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
#else
                int64_t found = key + i < count ? width : 0;
                store(unit, found == LANES ? load(from + place) : load_some(from + place, found));
#endif
                unit += step;
            }
        }
    }
}

INLINE void score(const int tile, Tile *t, const uint32_t *keys, int64_t length, int64_t count) {
    for (int64_t key = 0; key < count; key += PANEL) {
        floats sums[TILE][2] = {0};
        for (int64_t place = 0; place < length; place++, keys += PANEL) {
            floats left = load(keys), right = load(keys + LANES);
            UNROLL for (int i = 0; i < tile; i++) {
                sums[i][0] = multiply(sums[i][0], t->queries[i][place], left);
                sums[i][1] = multiply(sums[i][1], t->queries[i][place], right);
            }
        }
        UNROLL for (int i = 0; i < tile; i++) {
            store(&t->scores[i][key], sums[i][0]);
            store(&t->scores[i][key + LANES], sums[i][1]);
        }
    }
}

/* Of a query, the scores of a chunk as powers of 2 below the largest so far. */
INLINE void weigh(Tile *t, int i, int64_t seen, int64_t count, float scale) {
    int64_t padded = round_up(count, PANEL);
    float *scores = t->scores[i];
    for (int64_t key = seen; key < padded; key++) scores[key] = -3e38f;
    floats most = all(-3e38f);
    for (int64_t key = 0; key < padded; key += LANES) most = larger(most, load(scores + key));
    float before = t->largest[i], now = before;
    for (int lane = 0; lane < LANES; lane++) now = most[lane] * scale > now ? most[lane] * scale : now;
    floats sum = {0};
    for (int64_t key = 0; key < padded; key += PANEL) {
        floats left = exp2_of(load(scores + key) * scale - now);
        floats right = exp2_of(load(scores + key + LANES) * scale - now);
        sum += left + right;
        store_elements(&t->weights[i][key / UNIT], left, right);
    }
    memset((element *)t->weights[i] + seen, 0, (padded - seen) * sizeof(element));
    t->shrink[i] = exp2_of(all(before - now))[0];
    t->sum[i] *= t->shrink[i];
    for (int lane = 0; lane < LANES; lane++) t->sum[i] += sum[lane];
    t->largest[i] = now;
}

/* Add values to `vectors` vectors of each query's output. */
INLINE void mix(const int tile, const int vectors, Tile *t, const uint32_t *values, int64_t place, int64_t count) {
    floats sums[TILE][2];
    UNROLL for (int i = 0; i < tile; i++)
        for (int j = 0; j < vectors; j++) sums[i][j] = load(&t->out[i][place + j * LANES]) * t->shrink[i];
    for (int64_t unit = 0; unit < (count + UNIT - 1) / UNIT; unit++, values += LANES) {
        floats some[2];
        for (int j = 0; j < vectors; j++) some[j] = load(values + j * LANES * (CHUNK / UNIT));
        UNROLL for (int i = 0; i < tile; i++)
            for (int j = 0; j < vectors; j++) sums[i][j] = multiply(sums[i][j], t->weights[i][unit], some[j]);
    }
    UNROLL for (int i = 0; i < tile; i++)
        for (int j = 0; j < vectors; j++) store(&t->out[i][place + j * LANES], sums[i][j]);
}

INLINE void chunk(const int tile, Tile *t, const uint32_t *keys, const uint32_t *values, int64_t first, int64_t count,
                  int64_t dim, float scale) {
    score(tile, t, keys, dim / UNIT, count);
    for (int i = 0; i < tile; i++) {
        int64_t seen = least(count, t->seen[i] - first);
        weigh(t, i, seen < 0 ? 0 : seen, count, scale);
    }
    int64_t place = 0, step = CHUNK / UNIT;
    for (; place + 2 * LANES <= round_up(dim, LANES); place += 2 * LANES) mix(tile, 2, t, values + place * step, place, count);
    if (place < dim) mix(tile, 1, t, values + place * step, place, count);
}

/* `chunk` for each number of queries, so that their sums are registers. */
static void chunk_of(int tile, Tile *t, const uint32_t *keys, const uint32_t *values, int64_t first, int64_t count,
                     int64_t dim, float scale) {
    switch (tile) {
#define CASE(n) case n: chunk(n, t, keys, values, first, count, dim, scale); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#ifdef __AVX512F__
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

static void attend(const Pass *p, int64_t row, int64_t head, int64_t part, Tile *t, uint32_t *keys, uint32_t *values) {
    int64_t dim = p->dim, wide = round_up(dim, LANES), total = p->key_counts[row], packed = 0;
    int64_t first = p->query_ends[row], queries = p->query_ends[row + 1] - first;
    /* Heads that share their keys count as queries of their own. */
    int64_t size = round_up((queries * p->group + p->parts - 1) / p->parts, TILE);
    int64_t stop = least((part + 1) * size, queries * p->group);
    int is_only_tile = queries * p->group <= TILE;
    for (int64_t start = part * size; start < stop; start += TILE) {
        int tile = (int)least(TILE, stop - start);
        element *outs[TILE];
        for (int i = 0; i < tile; i++) {
            int64_t query = (start + i) / p->group, of_all = head * p->group + (start + i) % p->group;
            memcpy(t->queries[i], p->q + (first + query) * p->q_row + of_all * p->q_head, dim * sizeof(element));
            outs[i] = p->out + ((first + query) * p->kv_heads * p->group + of_all) * dim;
            t->seen[i] = p->causal ? total - queries + query + 1 : total;
            t->largest[i] = -3e38f;
            t->sum[i] = 0;
            memset(t->out[i], 0, wide * sizeof(float));
        }
        for (int64_t key = 0; key < t->seen[tile - 1]; key += CHUNK) {
            int64_t place = is_only_tile ? 0 : key;
            uint32_t *chunk_keys = keys + place * (dim / UNIT), *chunk_values = values + place / UNIT * wide;
            if (key >= packed) { /* when first needed, so that it is still in the cache */
                int64_t count = least(CHUNK, total - key);
                pack_keys(p, row, head, key, count, chunk_keys);
                pack_values(p, row, head, key, count, chunk_values);
                packed = key + CHUNK;
            }
            chunk_of(tile, t, chunk_keys, chunk_values, key, least(CHUNK, t->seen[tile - 1] - key), dim, p->scale);
        }
        for (int i = 0; i < tile; i++)
            for (int64_t place = 0; place < dim; place += PANEL) {
                float by = 1 / t->sum[i];
                element found[PANEL];
                store_elements(found, load(&t->out[i][place]) * by, load(&t->out[i][place + LANES]) * by);
                memcpy(outs[i] + place, found, least(PANEL, dim - place) * sizeof(element));
            }
    }
}

static void work(void *pass) {
    Pass *p = pass;
    char *mine = p->workspace + __atomic_fetch_add(&p->threads_started, 1, __ATOMIC_RELAXED) * p->workspace_size;
    uint32_t *keys = (uint32_t *)(mine + round_up(sizeof(Tile), 64));
    uint32_t *values = keys + p->packed_keys * (p->dim / UNIT);
    int64_t tasks = p->rows * p->kv_heads * p->parts;
    for (;;) {
        int64_t task = __atomic_fetch_add(&p->tasks_started, 1, __ATOMIC_RELAXED);
        if (task >= tasks) return;
        int64_t row_and_head = task / p->parts;
        attend(p, row_and_head / p->kv_heads, row_and_head % p->kv_heads, task % p->parts, (Tile *)mine, keys, values);
    }
}

void attention(Pass *p, Parallel parallel, unsigned threads) { parallel(work, p, threads, 0); }
