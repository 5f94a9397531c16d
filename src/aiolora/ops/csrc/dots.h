/* The dot products that linear and the scores of attention are made of, by tiles that stay in registers: 4 rows of w
   times up to TOKENS rows of x. A row of x is summed in the same order however many there are. */

#pragma once

#include "vectors.h"

#if defined(__AVX__) && !defined(__AVX512F__)
#define TOKENS 2 /* 16 registers: 8 sums, 4 of w, one of x */
#else
#define TOKENS 6 /* 32 registers: 24 sums, 4 of w, one of x */
#endif

INLINE void sum4(const vec *v, float *out) {
#ifdef __AVX512F__
    __m256 half_[4];
    for (int r = 0; r < 4; r++)
        half_[r] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[r]), _mm512_extractf32x8_ps((__m512)v[r], 1));
    __m256 low = _mm256_hadd_ps(half_[0], half_[1]), high = _mm256_hadd_ps(half_[2], half_[3]);
    __m256 all = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
    for (int r = 0; r < 4; r++)
        out[r] = sum(v[r]);
#endif
}

typedef const char *const *rows; /* where each row begins: rows of pages and of tokens need not be neighbours */

INLINE void step(vec acc[][4], rows w, int wt, rows x, int xt, i64 k, i64 count, int tokens, const char *next) {
    vec four[4];
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
        four[r] = load_some(w[r], k, wt, count);
        __builtin_prefetch(next + size(wt) * (4 * k + LANES * r), 0, 2);
    }
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++) {
        vec token = load_some(x[t], k, xt, count);
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++)
            acc[t][r] += four[r] * token;
    }
}

INLINE void tile(rows w, int wt, rows x, int xt, i64 K, int tokens, float *out, i64 ld, const char *next) {
    vec acc[TOKENS][4] = {0};
    i64 k = 0;
#ifdef __AVX512BF16__
    for (; wt == BF16 && xt == BF16 && k + 32 <= K; k += 32) {
        __m512bh four[4];
#pragma GCC unroll 4
        for (int r = 0; r < 4; r++) {
            four[r] = (__m512bh)_mm512_loadu_si512(w[r] + 2 * k);
            __builtin_prefetch(next + 2 * (4 * k + 32 * r), 0, 2);
        }
#pragma GCC unroll 6
        for (int t = 0; t < tokens; t++) {
            __m512bh token = (__m512bh)_mm512_loadu_si512(x[t] + 2 * k);
#pragma GCC unroll 4
            for (int r = 0; r < 4; r++)
                acc[t][r] = (vec)_mm512_dpbf16_ps((__m512)acc[t][r], four[r], token);
        }
    }
#endif
    for (; k + LANES <= K; k += LANES)
        step(acc, w, wt, x, xt, k, LANES, tokens, next);
    if (k < K)
        step(acc, w, wt, x, xt, k, K - k, tokens, next);
#pragma GCC unroll 6
    for (int t = 0; t < tokens; t++)
        sum4(acc[t], out + t * ld);
}

INLINE void dots(rows w, int wt, rows x, int xt, i64 K, i64 tokens, float *out, i64 ld, const char *next) {
    /* tokens in even blocks: 8 are 4 + 4, not 6 + 2 */
    i64 blocks = (tokens + TOKENS - 1) / TOKENS;
    for (i64 b = 0, t = 0; b < blocks; b++) {
        i64 count = (tokens - t + blocks - b - 1) / (blocks - b);
        float *o = out + t * ld;
        switch (count) {
        case 1: tile(w, wt, x + t, xt, K, 1, o, ld, next); break;
        case 2: tile(w, wt, x + t, xt, K, 2, o, ld, next); break;
#if TOKENS == 6
        case 3: tile(w, wt, x + t, xt, K, 3, o, ld, next); break;
        case 4: tile(w, wt, x + t, xt, K, 4, o, ld, next); break;
        case 5: tile(w, wt, x + t, xt, K, 5, o, ld, next); break;
        case 6: tile(w, wt, x + t, xt, K, 6, o, ld, next); break;
#endif
        }
        t += count;
    }
}

/* out[t * ld + r] = x[t] . w[r]: 4 rows of w, `tokens` rows of x, all of K elements. Meanwhile as many bytes as w has
   are prefetched from `next` on. Each file has its own: the compiler specialises them for the ld that it knows; shared
   ones made linear and attention 1-3% slower (2-core EPYC Zen4, gcc 12). */
typedef void dots_of(rows w, rows x, i64 K, i64 tokens, float *out, i64 ld, const char *next);

#define DOTS(name, wt, xt)                                                                        \
    static void name(rows w, rows x, i64 K, i64 tokens, float *out, i64 ld, const char *next) {   \
        dots(w, wt, x, xt, K, tokens, out, ld, next);                                             \
    }
DOTS(dots_ff, F32, F32)
DOTS(dots_fb, F32, BF16)
DOTS(dots_bf, BF16, F32)
DOTS(dots_bb, BF16, BF16)

static dots_of *const DOTS_OF[2][2] = {{dots_ff, dots_fb}, {dots_bf, dots_bb}}; /* [type of w][type of x] */
