/* Values of float32 or bfloat16 in memory, float32 in registers: a `vec` of LANES of them. NaN and infinity propagate:
   no flag of build_native.py lets the compiler assume that they do not occur. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#define LINE 64 /* bytes, of a cache */
#define INLINE static inline __attribute__((always_inline))
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t word __attribute__((vector_size(4 * LANES)));
typedef uint16_t half __attribute__((vector_size(2 * LANES)));
typedef int64_t i64;
enum { F32, BF16 }; /* constant after inlining: every use of a type below folds away */

INLINE i64 size(int type) { return type == BF16 ? 2 : 4; }

INLINE vec load(const char *p, i64 i, int type) {
    if (type == F32) {
        vec v;
        memcpy(&v, p + 4 * i, sizeof v);
        return v;
    }
#ifdef __AVX512F__ /* gcc 12 widens __builtin_convertvector by way of the stack */
    return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + 2 * i))), 16);
#else
    half h;
    memcpy(&h, p + 2 * i, sizeof h);
    return (vec)(__builtin_convertvector(h, word) << 16);
#endif
}

INLINE vec load_some(const char *p, i64 i, int type, i64 count) {
    char whole[4 * LANES] = {0};
    if (count >= LANES)
        return load(p, i, type);
    memcpy(whole, p + i * size(type), count * size(type));
    return load(whole, 0, type);
}

INLINE vec pick(word mask, vec a, vec b) { return (vec)((mask & (word)a) | (~mask & (word)b)); }

INLINE half rounded(vec v) { /* to nearest, ties to even; NaN stays NaN */
#ifdef __AVX512BF16__
    return (half)_mm512_cvtneps_pbh((__m512)v);
#else
    word bits = (word)v, nan = (word)(v != v);
    word up = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector((nan & (bits >> 16 | 0x40)) | (~nan & up), half);
#endif
}

INLINE void store_some(char *p, i64 i, int type, vec v, i64 count) {
    count = MIN(count, LANES);
    if (type == F32) {
        if (count == LANES)
            memcpy(p + 4 * i, &v, sizeof v);
        else
            memcpy(p + 4 * i, &v, 4 * count);
        return;
    }
    half h = rounded(v);
    if (count == LANES)
        memcpy(p + 2 * i, &h, sizeof h);
    else
        memcpy(p + 2 * i, &h, 2 * count);
}

INLINE float sum(vec v) { /* by halves: the order of sum4 */
    float x[LANES];
    memcpy(x, &v, sizeof v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++)
            x[i] += x[i + width];
    return x[0];
}

INLINE vec exponential(vec x) { /* 2 ulp: Cody-Waite reduction and the polynomial of Cephes' expf */
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, left in the low bits */
    vec zero = {0}, low = zero - 87.3f, high = zero + INFINITY;
    vec y = pick((word)(x < low), low, x);
    vec shifted = y * 1.44269504088896341f + magic, n = shifted - magic;
    vec r = y - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = zero + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p = (vec)((word)p + ((word)shifted << 23));
    return pick((word)(x != x), x, pick((word)(x > 88.3f), high, p));
}

INLINE void prefetch(const char *p, i64 nbytes) { /* inlined by force: gcc 12 drops calls that only prefetch */
    for (i64 i = 0; i < nbytes; i += LINE)
        __builtin_prefetch(p + i, 0, 2);
}
