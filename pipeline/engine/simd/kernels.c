/* The operations between matrix products and attention, for x86 CPUs: those of eager.py, which says what each computes.

   Each goes over its rows once, computes in float32, and rounds to the element where eager.py rounds. A row's width need
   not be a multiple of anything. */

#include "vector.h"

enum { MIN_SHARED = 32768 }; /* Elements; for fewer it takes longer to wake the other threads. */
enum { STEP = 8192 };        /* Elements that a thread takes at a time. */

typedef struct Work {
    void (*of_row)(const struct Work *, int64_t row);
    int64_t rows, step, started;
    element *x, *out;
    const element *added, *weight, *bias;
    int64_t x_row, out_row, added_row; /* strides, in elements */
    const void *cos, *sin;
    int64_t angle_row;
    element *keys, *values;
    const int64_t *slots;
    int64_t heads, kv_heads, width; /* of a row; width of each of its heads */
    float eps;
} Work;

static void share(void *work) {
    Work *w = work;
    for (;;) {
        int64_t row = __atomic_fetch_add(&w->started, w->step, __ATOMIC_RELAXED), stop = least(row + w->step, w->rows);
        if (row >= w->rows) return;
        for (; row < stop; row++) w->of_row(w, row);
    }
}

static void run(Work *w, int64_t row_elements, Parallel parallel, unsigned threads) {
    w->step = 1 + STEP / row_elements;
    if (w->rows * row_elements < MIN_SHARED)
        share(w);
    else
        parallel(share, w, threads, 0);
}

/* `count` elements, with zeros behind them if that is less than a vector. */
INLINE floats get(const element *from, int64_t count) {
    if (count >= LANES) return widen(from);
    element some[LANES] = {0};
    memcpy(some, from, count * sizeof(element));
    return widen(some);
}

INLINE void put(element *to, floats x, int64_t count) {
    if (count >= LANES) {
        narrow(to, x);
        return;
    }
    element some[LANES];
    narrow(some, x);
    memcpy(to, some, count * sizeof(element));
}

INLINE float total(floats x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

/* ---- norms */

INLINE void norm(const Work *w, int64_t row, const int is_layer_norm) {
    for (int64_t head = 0; head < w->heads; head++) {
        int64_t start = head * w->width, width = w->width;
        element *x = w->x + row * w->x_row + start, *out = w->out + row * w->out_row + start;
        const element *added = w->added ? w->added + row * w->added_row + start : NULL, *weight = w->weight + start;
        floats sum = {0}, squares = {0};
        for (int64_t i = 0; i < width; i += LANES) {
            floats value = get(x + i, width - i);
            if (added) {
                value = rounded(value + get(added + i, width - i));
                put(x + i, value, width - i);
            }
            sum += value;
            squares += value * value;
        }
        float mean = 0;
        if (is_layer_norm) { /* squares again, of the differences: more exact */
            mean = total(sum) / width;
            squares = all(0);
            for (int64_t i = 0; i < width; i += LANES) {
                floats difference = get(x + i, width - i) - mean;
                for (int64_t lane = width - i; lane < LANES; lane++) difference[lane] = 0;
                squares += difference * difference;
            }
        }
        float factor = 1 / __builtin_sqrtf(total(squares) / width + w->eps);
        for (int64_t i = 0; i < width; i += LANES) {
            floats value = (get(x + i, width - i) - mean) * factor;
            if (is_layer_norm)
                value = value * get(weight + i, width - i) + get(w->bias + i, width - i);
            else
                value = rounded(value) * get(weight + i, width - i);
            put(out + i, value, width - i);
        }
    }
}

static void layer_norm(const Work *w, int64_t row) { norm(w, row, 1); }

static void rms_norm(const Work *w, int64_t row) { norm(w, row, 0); }

/* Of x [rows, heads, width], to which `added` is added first: a LayerNorm, or without a bias an RMSNorm. */
void add_norm(element *x, int64_t x_row, const element *added, int64_t added_row, element *out, int64_t out_row,
              const element *weight, const element *bias, int64_t rows, int64_t heads, int64_t width, float eps,
              Parallel parallel, unsigned threads) {
    Work w = {.of_row = bias ? layer_norm : rms_norm, .x = x, .x_row = x_row, .added = added, .added_row = added_row,
              .out = out, .out_row = out_row, .weight = weight, .bias = bias, .rows = rows, .heads = heads,
              .width = width, .eps = eps};
    run(&w, heads * width, parallel, threads);
}

/* ---- rotations */

static void rotate_in_float(const Work *w, int64_t row) {
    const float *cos = (const float *)w->cos + row * w->angle_row, *sin = (const float *)w->sin + row * w->angle_row;
    int64_t half = w->width / 2;
    for (element *x = w->x + row * w->x_row, *end = x + w->heads * w->width; x < end; x += w->width)
        for (int64_t i = 0; i < half; i += LANES) {
            int64_t count = least(LANES, half - i);
            floats first = get(x + i, count), second = get(x + half + i, count), c = {0}, s = {0};
            memcpy(&c, cos + i, count * sizeof(float));
            memcpy(&s, sin + i, count * sizeof(float));
            put(x + i, first * c - second * s, count);
            put(x + half + i, second * c + first * s, count);
        }
}

static void rotate_in_elements(const Work *w, int64_t row) {
    const element *cos = (const element *)w->cos + row * w->angle_row;
    const element *sin = (const element *)w->sin + row * w->angle_row;
    int64_t half = w->width / 2, all_keys = w->kv_heads * w->width;
    element *x = w->x + row * w->x_row, *end = x + w->heads * w->width;
    for (; x < end; x += w->width)
        for (int64_t i = 0; i < half; i += LANES) {
            int64_t count = half - i;
            floats first = get(x + i, count), second = get(x + half + i, count);
            floats c = get(cos + i, count), s = get(sin + i, count);
            put(x + i, rounded(first * c) - rounded(second * s), count);
            put(x + half + i, rounded(second * c) + rounded(first * s), count);
        }
    memcpy(w->keys + w->slots[row] * all_keys, end - all_keys, all_keys * sizeof(element));
    memcpy(w->values + w->slots[row] * all_keys, end, all_keys * sizeof(element));
}

/* The first heads of x [rows, >= heads, width], by angles [rows, width] of float32. */
void rotate(element *x, int64_t x_row, const float *cos, const float *sin, int64_t angle_row, int64_t rows,
            int64_t heads, int64_t width, Parallel parallel, unsigned threads) {
    Work w = {.of_row = rotate_in_float, .x = x, .x_row = x_row, .cos = cos, .sin = sin, .angle_row = angle_row,
              .rows = rows, .heads = heads, .width = width};
    run(&w, heads * width, parallel, threads);
}

/* The same by angles of the element's type; of a row the last kv_heads rotated are keys, and as many values follow. */
void rotate_and_cache(element *x, int64_t x_row, const element *cos, const element *sin, int64_t angle_row, int64_t rows,
                      int64_t heads, int64_t kv_heads, int64_t width, element *keys, element *values,
                      const int64_t *slots, Parallel parallel, unsigned threads) {
    Work w = {.of_row = rotate_in_elements, .x = x, .x_row = x_row, .cos = cos, .sin = sin, .angle_row = angle_row,
              .rows = rows, .heads = heads, .kv_heads = kv_heads, .width = width, .keys = keys, .values = values,
              .slots = slots};
    run(&w, (heads + kv_heads) * width, parallel, threads);
}

/* ---- activations */

/* 0 where torch's exp overflows, which exp2_of does not. */
INLINE floats sigmoid(floats x) {
    floats found = 1 / (1 + exp2_of(x * -1.4426950408889634f));
    return (floats)((ints)found & (x > all(-88.0f)));
}

static void quick_gelu_of_row(const Work *w, int64_t row) {
    element *x = w->x + row * w->x_row;
    for (int64_t i = 0; i < w->width; i += LANES) {
        floats value = get(x + i, w->width - i);
        put(x + i, rounded(sigmoid(rounded(value * 1.702f))) * value, w->width - i);
    }
}

static void silu_times_up_of_row(const Work *w, int64_t row) {
    const element *gate = w->x + row * w->x_row, *up = gate + w->width;
    element *out = w->out + row * w->out_row;
    for (int64_t i = 0; i < w->width; i += LANES) {
        floats value = get(gate + i, w->width - i);
        put(out + i, rounded(value * sigmoid(value)) * get(up + i, w->width - i), w->width - i);
    }
}

/* Of x [rows, width], in place. */
void quick_gelu(element *x, int64_t x_row, int64_t rows, int64_t width, Parallel parallel, unsigned threads) {
    Work w = {.of_row = quick_gelu_of_row, .x = x, .x_row = x_row, .rows = rows, .width = width};
    run(&w, width, parallel, threads);
}

/* Gate and up x [rows, 2 * width] to out [rows, width]. */
void silu_times_up(element *x, int64_t x_row, element *out, int64_t out_row, int64_t rows, int64_t width,
                   Parallel parallel, unsigned threads) {
    Work w = {.of_row = silu_times_up_of_row, .x = x, .x_row = x_row, .out = out, .out_row = out_row, .rows = rows,
              .width = width};
    run(&w, 2 * width, parallel, threads);
}
