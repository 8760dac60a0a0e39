/* Vectors of float32 on x86 CPUs, and elements (bfloat16 or float32) that become such vectors.

   Compiled for AVX2 in float32, for AVX-512 in float32, or (BFLOAT16) for AVX512_BF16 in bfloat16. */

#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t element;
enum { UNIT = 2 };
#else
typedef float element;
enum { UNIT = 1 };
#endif

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t units __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

INLINE floats load(const void *from) {
    floats x;
    memcpy(&x, from, sizeof x);
    return x;
}

INLINE void store(void *to, floats x) { memcpy(to, &x, sizeof x); }

INLINE floats all(float x) { return x - (floats){0}; }

INLINE floats larger(floats a, floats b) {
#ifdef __AVX512F__
    return (floats)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return (floats)_mm256_max_ps((__m256)a, (__m256)b);
#endif
}

INLINE floats smaller(floats a, floats b) {
#ifdef __AVX512F__
    return (floats)_mm512_min_ps((__m512)a, (__m512)b);
#else
    return (floats)_mm256_min_ps((__m256)a, (__m256)b);
#endif
}

/* `count` elements, fewer than a vector of 32-bit units has, with zeros behind them. */
INLINE floats load_some(const element *from, int64_t count) {
    floats x = {0};
    memcpy(&x, from, count * sizeof(element));
    return x;
}

#ifdef BFLOAT16
INLINE floats from_bfloat16(__m256i x) { return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16); }

INLINE __m256i to_bfloat16(floats x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
#endif

/* LANES elements. */
INLINE floats widen(const element *from) {
#ifdef BFLOAT16
    return from_bfloat16(_mm256_loadu_si256((const __m256i *)from));
#else
    return load(from);
#endif
}

INLINE void narrow(element *to, floats x) {
#ifdef BFLOAT16
    _mm256_storeu_si256((__m256i *)to, to_bfloat16(x));
#else
    store(to, x);
#endif
}

/* The values that x has as elements. */
INLINE floats rounded(floats x) {
#ifdef BFLOAT16
    return from_bfloat16(to_bfloat16(x));
#else
    return x;
#endif
}

/* 2^x to 3e-7 of its value, between 2^-126 and 2^126; 1 for 0, and NaN for NaN, which the second argument of `larger` and
   of `smaller` keeps. */
INLINE floats exp2_of(floats x) {
    const floats magic = all(12582912.0f); /* 1.5 * 2^23: a sum with it has the nearest whole number in its last bits */
    x = smaller(all(126.0f), larger(all(-126.0f), x));
    floats shifted = x + magic, part = x - (shifted - magic);
    floats power = all(0.0013276472f) * part + all(0.0096755415f);
    power = power * part + all(0.0555071328f);
    power = power * part + all(0.2402211972f);
    power = power * part + all(0.6931469671f);
    power = power * part + all(1.0f);
    return (floats)((ints)power + ((ints)shifted << 23));
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* GOMP_parallel of the OpenMP that torch uses, so that its threads work here too. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
