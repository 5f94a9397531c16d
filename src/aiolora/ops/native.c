/* The decode path's ops for the CPU: float32 or bfloat16 in memory, float32 in registers. native.py builds and calls
   it: every exported function takes one packed struct of 8-byte fields, in the order of the tuples there.

   A row of a result is summed in the same order whatever else is in the batch and whatever the number of threads. NaN
   and infinity propagate: no flag here lets the compiler assume that they do not occur. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
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

/* ---- memory <-> registers ---- */

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

/* ---- threads ---- */

typedef void worker(void *job, int thread, int threads);

static void launch(worker *work, void *job, i64 threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(job, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(job, 0, 1);
}

static void meet(void) { /* every thread of the launch arrives before any goes on */
#ifdef _OPENMP
#pragma omp barrier
#endif
}

static void span(i64 total, int thread, int threads, i64 *low, i64 *high) {
    *low = total * thread / threads;
    *high = total * (thread + 1) / threads;
}

/* ---- dot products: 4 rows of w times `tokens` rows of x ---- */

/* Weights are prefetched into the second level cache this many bytes ahead, line after line, while 4 rows are in work:
   one Zen4 core then reads 20-22 GB/s instead of 11 (8 tokens: 7), two cores all that memory gives (30). */
#define AHEAD 16384

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
    /* out[t * ld + r] = x[t] . w[r]; tokens in even blocks: 8 are 4 + 4, not 6 + 2; `next`: 4 rows to prefetch */
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

/* ---- linear: y = x w^T, and what the adapters add ---- */

#define MAX_TOKENS 1024 /* as in native.py */
#define BLOCK 24        /* tokens that pass over some weights at a time: of 576 bfloat16 they fit the first level cache */
#define MAX_THREADS 256
#define COLUMNS 32 /* of y that a thread takes at a time: 64 bytes of bfloat16, so threads share no cache line */

typedef struct {
    i64 threads, type, T, K, N;
    const char *x, *w; /* [T, K], [N, K] */
    char *y;           /* [T, N] */
    i64 S, adapter_type; /* S 0: no adapters, and nothing below is there */
    const char *a, *b;   /* [S, P, 8, K], [P, 8, N] */
    i64 a_slice, a_page, b_page; /* strides, elements */
    const int32_t *perm, *tiles; /* [T'], [G, 3] */
    i64 G;
    const int32_t *pages; /* [M, kinds, W], already at this kind */
    const float *scales;
    i64 row_stride, W; /* elements between rows of pages and scales */
    i64 bounds[];      /* S + 1 */
} linear_args;

typedef struct {
    i64 row, start, count, pages; /* tokens perm[start : start + count] share one adapter: its bytes are read once */
} run;

typedef struct {
    const linear_args *args;
    run runs[MAX_TOKENS];
    i64 num_runs;
    float *h; /* [position in perm, S, W * 8], scaled */
    int shares;            /* of the columns: one a thread */
    i64 next[MAX_THREADS]; /* of each share the first column that nobody has taken */
} linear_job;

static const char *unit_rows(const linear_job *job, i64 unit, const run **u, i64 *s, i64 *p, i64 *rank) {
    /* where the four ranks of shrink unit `unit` begin: units count ranks, then pages, then slices, then runs */
    const linear_args *c = job->args;
    for (*u = job->runs; unit >= 2 * (*u)->pages * c->S; ++*u)
        unit -= 2 * (*u)->pages * c->S;
    *rank = unit % 2 * 4;
    *p = unit / 2 % (*u)->pages;
    *s = unit / 2 / (*u)->pages;
    i64 page = c->pages[(*u)->row * c->row_stride + *p];
    return c->a + (*s * c->a_slice + page * c->a_page + *rank * c->K) * size(c->adapter_type);
}

static void shrink(const linear_job *job, int thread, int threads) {
    const linear_args *c = job->args;
    i64 units = 0, low, high, s, p, rank, ld = c->S * c->W * 8, width = c->K * size(c->adapter_type);
    const run *u;
    for (i64 i = 0; i < job->num_runs; i++)
        units += 2 * job->runs[i].pages * c->S;
    span(units, thread, threads, &low, &high);
    for (i64 unit = low; unit < high; unit++) {
        const char *next = unit_rows(job, MIN(unit + 2, units - 1), &u, &s, &p, &rank);
        const char *first = unit_rows(job, unit, &u, &s, &p, &rank);
        const char *a[4] = {first, first + width, first + 2 * width, first + 3 * width}, *x[MAX_TOKENS];
        float *h = job->h + u->start * ld + (s * c->W + p) * 8 + rank, scale = c->scales[u->row * c->row_stride + p];
        for (i64 t = 0; t < u->count; t++)
            x[t] = c->x + c->perm[u->start + t] * c->K * size(c->type);
        DOTS_OF[c->adapter_type][c->type](a, x, c->K, u->count, h, ld, next);
        for (i64 t = 0; t < u->count; t++)
            for (i64 r = 0; r < 4; r++)
                h[t * ld + r] *= scale;
    }
}

INLINE void expand_block(const linear_job *job, const run *u, int type, i64 s, i64 first, int tokens, float *sums,
                         i64 n0, i64 n1) {
    /* sums[t * COLUMNS + n % COLUMNS] += h[t, s] b[pages, n]: `tokens` of the run, columns n0 to n1 of slice s */
    const linear_args *c = job->args;
    const int32_t *pages = c->pages + u->row * c->row_stride, *perm = c->perm + u->start + first;
    const float *h = job->h + ((u->start + first) * c->S + s) * c->W * 8;
    i64 ld = c->S * c->W * 8;
    for (i64 n = n0; n < n1; n += LANES) {
        vec acc[4];
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
            acc[t] = load_some((char *)(sums + perm[t] * COLUMNS), n % COLUMNS, F32, n1 - n);
        for (i64 p = 0; p < u->pages; p++) {
            const char *b = c->b + (pages[p] * c->b_page + n) * size(type);
#pragma GCC unroll 8
            for (i64 r = 0; r < 8; r++) {
                vec row = load_some(b, r * c->N, type, n1 - n);
#pragma GCC unroll 4
                for (int t = 0; t < tokens; t++)
                    acc[t] += row * h[t * ld + p * 8 + r];
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++)
            store_some((char *)(sums + perm[t] * COLUMNS), n % COLUMNS, F32, acc[t], n1 - n);
    }
}

INLINE void expand(const linear_job *job, int type, float *sums, i64 n0, i64 n1) {
    const linear_args *c = job->args;
    for (const run *u = job->runs; u < job->runs + job->num_runs; u++)
        for (i64 s = 0; s < c->S; s++) {
            i64 low = MAX(n0, c->bounds[s]), high = MIN(n1, c->bounds[s + 1]);
            for (i64 t = 0; low < high && t < u->count; t += 4)
                switch (MIN(4, u->count - t)) {
                case 1: expand_block(job, u, type, s, t, 1, sums, low, high); break;
                case 2: expand_block(job, u, type, s, t, 2, sums, low, high); break;
                case 3: expand_block(job, u, type, s, t, 3, sums, low, high); break;
                case 4: expand_block(job, u, type, s, t, 4, sums, low, high); break;
                }
        }
}

INLINE void prefetch_columns(const linear_job *job, i64 n0) { /* of b: they arrive during the base product */
    const linear_args *c = job->args;
    i64 width = size(c->adapter_type);
    for (const run *u = job->runs; u < job->runs + job->num_runs; u++)
        for (i64 p = 0; p < u->pages; p++) {
            const char *b = c->b + (c->pages[u->row * c->row_stride + p] * c->b_page + n0) * width;
            for (i64 r = 0; r < 8; r++)
                prefetch(b + r * c->N * width, COLUMNS * width);
        }
}

INLINE void linear_columns(linear_job *job, int type, i64 n0) {
    const linear_args *c = job->args;
    float sums[MAX_TOKENS * COLUMNS];
    const char *x[MAX_TOKENS];
    i64 n1 = MIN(n0 + COLUMNS, c->N);
    for (i64 t = 0; t < c->T; t++)
        x[t] = c->x + t * c->K * size(type);
    if (job->num_runs)
        prefetch_columns(job, n0);
    i64 blocks = (c->T + BLOCK - 1) / BLOCK;
    for (i64 block = 0; block < blocks; block++) {
        i64 t = c->T * block / blocks, count = c->T * (block + 1) / blocks - t;
        for (i64 n = n0; n < n1; n += 4) {
            const char *w[4];
            for (i64 r = 0; r < 4; r++) /* past the end: the last row again, its sums are not stored */
                w[r] = c->w + MIN(n + r, c->N - 1) * c->K * size(type);
            const char *next = block == 0 ? w[0] + AHEAD : w[0];
            DOTS_OF[type][type](w, x + t, c->K, count, sums + t * COLUMNS + n - n0, COLUMNS, next);
        }
    }
    if (job->num_runs && c->adapter_type == BF16)
        expand(job, BF16, sums, n0, n1);
    else if (job->num_runs)
        expand(job, F32, sums, n0, n1);
    for (i64 t = 0; t < c->T; t++)
        for (i64 n = n0; n < n1; n += LANES)
            store_some(c->y + t * c->N * size(type), n, type, load((char *)(sums + t * COLUMNS), n - n0, F32), n1 - n);
}

static i64 first_column(const linear_args *c, int share, int shares) {
    return MIN((c->N + COLUMNS - 1) / COLUMNS * share / shares * COLUMNS, c->N);
}

static void linear_worker(void *argument, int thread, int threads) {
    linear_job *job = argument;
    const linear_args *c = job->args;
    if (job->num_runs) {
        shrink(job, thread, threads);
        meet();
    }
    for (int i = 0; i < job->shares; i++) { /* its own columns in order, for the prefetch; then what others left */
        int owner = (thread + i) % job->shares;
        i64 n0, end = first_column(c, owner + 1, job->shares);
        while ((n0 = __atomic_fetch_add(job->next + owner, COLUMNS, __ATOMIC_RELAXED)) < end)
            if (c->type == BF16)
                linear_columns(job, BF16, n0);
            else
                linear_columns(job, F32, n0);
    }
}

static i64 find_runs(linear_job *job) { /* neighbouring tiles of a row become one run */
    /* returns how many positions of perm are used, -1 where tiles list a token twice */
    const linear_args *c = job->args;
    i64 end = 0, tokens = 0;
    for (const int32_t *tile = c->tiles; tile < c->tiles + 3 * c->G; tile += 3) {
        run *last = job->runs + job->num_runs - 1;
        i64 row = tile[0], start = tile[1], count = tile[2], held = 0;
        const int32_t *pages = c->pages + row * c->row_stride;
        if (count == 0)
            continue;
        while (held < c->W && pages[held] >= 0)
            held++;
        if (held == 0)
            continue;
        tokens += count;
        if (tokens > c->T)
            return -1;
        end = MAX(end, start + count);
        if (job->num_runs && last->row == row && last->start + last->count == start)
            last->count += count;
        else
            job->runs[job->num_runs++] = (run){row, start, count, held};
    }
    return end;
}

int linear(const linear_args *c) { /* returns 1 where it cannot be done: no memory, or tiles that make no sense */
    linear_job job;
    job.args = c;
    job.num_runs = 0;
    job.h = 0;
    if (c->S) {
        i64 positions = find_runs(&job);
        if (positions < 0 || (positions > 0 && !(job.h = malloc(positions * c->S * c->W * 8 * sizeof(float)))))
            return 1;
    }
    job.shares = (int)MIN(c->threads, MAX_THREADS);
    for (int i = 0; i < job.shares; i++)
        job.next[i] = first_column(c, i, job.shares);
    launch(linear_worker, &job, job.shares);
    free(job.h);
    return 0;
}

/* ---- element by element: norm, activation, rotary positions ---- */

#define SERIAL 32768 /* elements that one thread does in less time than waking a second one takes to pay off */

typedef struct {
    i64 threads, type, T, H;
    const char *residual, *y, *bias; /* [T, H], [T, H] or null (rms_norm: residual is x), [H] or null */
    const char *weight;
    char *out, *total; /* [T, H]; total is null where y is */
    double eps;
} norm_args;

INLINE void norm_row(const norm_args *c, int type, i64 row) {
    i64 at = row * c->H * size(type);
    const char *x = c->residual + at;
    char *out = c->out + at;
    vec squares = {0};
    if (c->y) { /* the new residual, as rounded as it is stored */
        char *total = c->total + at;
        for (i64 i = 0; i < c->H; i += LANES) {
            vec value = load_some(c->y + at, i, type, c->H - i);
            if (c->bias)
                value += load_some(c->bias, i, type, c->H - i);
            store_some(total, i, type, value + load_some(x, i, type, c->H - i), c->H - i);
        }
        x = total;
    }
    for (i64 i = 0; i < c->H; i += LANES) {
        vec value = load_some(x, i, type, c->H - i);
        squares += value * value;
    }
    float scale = 1.0f / sqrtf(sum(squares) / c->H + (float)c->eps);
    for (i64 i = 0; i < c->H; i += LANES) {
        vec value = load_some(x, i, type, c->H - i) * load_some(c->weight, i, type, c->H - i);
        store_some(out, i, type, value * scale, c->H - i);
    }
}

static void norm_worker(void *argument, int thread, int threads) {
    const norm_args *c = argument;
    i64 low, high;
    span(c->T, thread, threads, &low, &high);
    for (i64 t = low; t < high; t++)
        if (c->type == BF16)
            norm_row(c, BF16, t);
        else
            norm_row(c, F32, t);
}

int norm(norm_args *c) {
    launch(norm_worker, c, c->T * c->H < SERIAL ? 1 : c->threads);
    return 0;
}

typedef struct {
    i64 threads, type, T, I;
    const char *y, *bias; /* [T, 2 I] = (gate, up), [2 I] or null */
    char *out;            /* [T, I] */
} silu_args;

INLINE void silu_row(const silu_args *c, int type, i64 row) {
    const char *gate = c->y + row * 2 * c->I * size(type), *up = gate + c->I * size(type);
    for (i64 i = 0; i < c->I; i += LANES) {
        vec g = load_some(gate, i, type, c->I - i), u = load_some(up, i, type, c->I - i);
        if (c->bias) {
            g += load_some(c->bias, i, type, c->I - i);
            u += load_some(c->bias + c->I * size(type), i, type, c->I - i);
        }
        store_some(c->out + row * c->I * size(type), i, type, g / (exponential(-g) + 1.0f) * u, c->I - i);
    }
}

static void silu_worker(void *argument, int thread, int threads) {
    const silu_args *c = argument;
    i64 low, high;
    span(c->T, thread, threads, &low, &high);
    for (i64 t = low; t < high; t++)
        if (c->type == BF16)
            silu_row(c, BF16, t);
        else
            silu_row(c, F32, t);
}

int silu_mul(silu_args *c) {
    launch(silu_worker, c, c->T * c->I < SERIAL ? 1 : c->threads);
    return 0;
}

#define MAX_HEAD 512

typedef struct {
    i64 threads, type, T, H, G, D;
    const char *y, *bias;          /* [T, (H + 2 G) D], [(H + 2 G) D] or null */
    const char *q_norm, *k_norm;   /* [D] or null */
    const float *cos_sin;          /* [positions, D] */
    const int32_t *positions, *slots; /* [T] */
    char *q, *k_cache, *v_cache;   /* [T, H, D], [slots, G, D] */
    double eps;
} rope_args;

INLINE void rope_token(const rope_args *c, int type, i64 t) {
    i64 D = c->D, middle = D / 2, slot = c->slots[t];
    const char *cos_row = (const char *)(c->cos_sin + c->positions[t] * D);
    for (i64 head = 0; head < c->H + 2 * c->G; head++) {
        float values[MAX_HEAD];
        char *x = (char *)values, *out;
        const char *weight = head < c->H ? c->q_norm : head < c->H + c->G ? c->k_norm : 0;
        vec squares = {0};
        if (head < c->H)
            out = c->q + (t * c->H + head) * D * size(type);
        else if (slot < 0)
            return;
        else if (head < c->H + c->G)
            out = c->k_cache + (slot * c->G + head - c->H) * D * size(type);
        else
            out = c->v_cache + (slot * c->G + head - c->H - c->G) * D * size(type);
        for (i64 i = 0; i < D; i += LANES) {
            vec value = load_some(c->y + t * (c->H + 2 * c->G) * D * size(type), head * D + i, type, D - i);
            if (c->bias)
                value += load_some(c->bias, head * D + i, type, D - i);
            squares += value * value;
            store_some(x, i, F32, value, D - i);
        }
        if (weight) {
            float scale = 1.0f / sqrtf(sum(squares) / D + (float)c->eps);
            for (i64 i = 0; i < D; i += LANES)
                store_some(x, i, F32, load_some(x, i, F32, D - i) * scale * load_some(weight, i, type, D - i), D - i);
        }
        if (head >= c->H + c->G) {
            for (i64 i = 0; i < D; i += LANES)
                store_some(out, i, type, load_some(x, i, F32, D - i), D - i);
            continue;
        }
        for (i64 i = 0; i < middle; i += LANES) {
            vec low = load_some(x, i, F32, middle - i), high = load_some(x, middle + i, F32, middle - i);
            vec cosine = load_some(cos_row, i, F32, middle - i), sine = load_some(cos_row, middle + i, F32, middle - i);
            store_some(out, i, type, low * cosine - high * sine, middle - i);
            store_some(out, middle + i, type, high * cosine + low * sine, middle - i);
        }
    }
}

static void rope_worker(void *argument, int thread, int threads) {
    const rope_args *c = argument;
    i64 low, high;
    span(c->T, thread, threads, &low, &high);
    for (i64 t = low; t < high; t++)
        if (c->type == BF16)
            rope_token(c, BF16, t);
        else
            rope_token(c, F32, t);
}

int rope_store(rope_args *c) {
    launch(rope_worker, c, c->T * (c->H + 2 * c->G) * c->D < SERIAL ? 1 : c->threads);
    return 0;
}

/* ---- attention of few queries over paged keys: split over keys (FlashDecoding), merged after ---- */

#define KEYS 256      /* of one part: fixed, so that a result does not depend on threads or batch mates */
#define MAX_QUERIES 8 /* of one sequence; native.py leaves longer ones to the reference */
#define WIDE (LANES == 16 ? 4 : 2)

typedef struct {
    i64 threads, type, B, H, G, D, page_size, max_pages, window;
    const char *q, *k_cache, *v_cache; /* [T, H, D], [P, page_size, G, D] */
    const int32_t *tables, *lengths, *starts; /* [B, max_pages], [B], [B + 1] */
    char *out;                                /* [T, H, D] */
    double scale;
} attention_args;

typedef struct {
    i64 queries, first, parts; /* of one sequence: its first part begins at key `first` * KEYS */
    float *partial;            /* [parts, queries * H, D + 2]: sum of weights times values, maximum, sum of weights */
} sequence;

typedef struct {
    const attention_args *args;
    sequence *sequences;
} attention_job;

INLINE void add_values(rows v, int type, const float *weights, i64 keys, i64 d, int wide, int queries, float *out,
                       i64 ld) {
    /* out[i * ld + d ...] = sum over keys of weights[i, key] v[key, d ...] for `wide` registers of values */
    vec acc[4][4] = {0};
    for (i64 key = 0; key < keys; key++) {
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++) {
            vec value = load(v[key], d + j * LANES, type);
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++)
                acc[i][j] += value * weights[i * KEYS + key];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 4
        for (int j = 0; j < wide; j++)
            memcpy(out + i * ld + d + j * LANES, &acc[i][j], sizeof(vec));
}

INLINE void all_values(rows v, int type, const float *weights, i64 keys, i64 D, int queries, float *out, i64 ld) {
    i64 d = 0;
    for (; d + WIDE * LANES <= D; d += WIDE * LANES)
        add_values(v, type, weights, keys, d, WIDE, queries, out, ld);
    for (; d < D; d += LANES)
        add_values(v, type, weights, keys, d, 1, queries, out, ld);
}

INLINE void attend(const attention_args *c, int type, const sequence *s, i64 b, i64 part, i64 group) {
    const char *k[KEYS + 3], *v[KEYS + 3];
    i64 width = c->D * size(type), shared = c->H / c->G, length = c->lengths[b];
    i64 low = (s->first + part) * KEYS, keys = MIN(length - low, KEYS);
    const int32_t *page = c->tables + b * c->max_pages + low / c->page_size;
    for (i64 key = 0, offset = low % c->page_size; key < keys; key++, offset++) {
        if (offset == c->page_size) {
            page++;
            offset = 0;
        }
        i64 at = ((*page * c->page_size + offset) * c->G + group) * width;
        k[key] = c->k_cache + at;
        v[key] = c->v_cache + at;
    }
    v[keys] = v[keys + 1] = v[keys + 2] = v[keys - 1];
    k[keys] = k[keys + 1] = k[keys + 2] = k[keys - 1]; /* scores are taken four at a time */
    for (i64 first = 0; first < s->queries * shared; first += 4) {
        float weights[4 * KEYS] __attribute__((aligned(64)));
        const char *q[4];
        int queries = (int)MIN(4, s->queries * shared - first);
        float *out = s->partial + (part * s->queries * c->H + group * s->queries * shared + first) * (c->D + 2);
        for (int i = 0; i < queries; i++) {
            i64 query = c->starts[b] + (first + i) / shared, head = group * shared + (first + i) % shared;
            q[i] = c->q + (query * c->H + head) * width;
        }
        for (i64 key = 0; key < keys; key += 4) {
            for (i64 i = 0; first == 0 && i < 4; i++) {
                prefetch(k[MIN(key + 32 + i, keys)], width);
                prefetch(v[key + i], width);
            }
            DOTS_OF[type][type](k + key, q, c->D, queries, weights + key, KEYS, k[key]);
        }
        for (int i = 0; i < queries; i++) {
            float *w = weights + i * KEYS, top = -INFINITY;
            i64 end = length - s->queries + (first + i) / shared + 1 - low; /* keys that this query sees: from, end */
            i64 from = c->window > 0 ? MAX(end - c->window, 0) : 0;
            vec zero = {0}, total = zero, best = zero - INFINITY;
            end = MIN(end, keys);
            for (i64 key = 0; key < MIN(from, keys); key++)
                w[key] = -INFINITY;
            for (i64 key = MAX(end, 0); key < (keys + LANES - 1) / LANES * LANES; key++)
                w[key] = -INFINITY;
            for (i64 key = 0; key < keys; key += LANES) {
                vec score = load((char *)(w + key), 0, F32);
                best = pick((word)(score > best), score, best);
            }
            for (int lane = 0; lane < LANES; lane++)
                top = MAX(top, best[lane]);
            for (i64 key = 0; key < keys; key += LANES) {
                vec score = load((char *)(w + key), 0, F32);
                vec weight = pick((word)(score == -INFINITY), zero, exponential((score - top) * (float)c->scale));
                total += weight;
                memcpy(w + key, &weight, sizeof weight);
            }
            out[i * (c->D + 2) + c->D] = top * (float)c->scale;
            out[i * (c->D + 2) + c->D + 1] = sum(total);
        }
        switch (queries) {
        case 1: all_values(v, type, weights, keys, c->D, 1, out, c->D + 2); break;
        case 2: all_values(v, type, weights, keys, c->D, 2, out, c->D + 2); break;
        case 3: all_values(v, type, weights, keys, c->D, 3, out, c->D + 2); break;
        case 4: all_values(v, type, weights, keys, c->D, 4, out, c->D + 2); break;
        }
    }
}

INLINE void merge(const attention_args *c, int type, const sequence *s, i64 b, i64 row) {
    i64 shared = c->H / c->G, group = row / (s->queries * shared), i = row % (s->queries * shared);
    i64 query = c->starts[b] + i / shared, head = group * shared + i % shared, ld = s->queries * c->H * (c->D + 2);
    const float *part = s->partial + row * (c->D + 2);
    float top = -INFINITY, total = 0;
    vec zero = {0};
    for (i64 p = 0; p < s->parts; p++)
        top = MAX(top, part[p * ld + c->D]);
    for (i64 p = 0; p < s->parts; p++)
        total += part[p * ld + c->D + 1] * exponential(zero + part[p * ld + c->D] - top)[0];
    for (i64 d = 0; d < c->D; d += LANES) {
        vec out = zero;
        for (i64 p = 0; p < s->parts; p++)
            out += load((const char *)(part + p * ld), d, F32) * exponential(zero + part[p * ld + c->D] - top);
        store_some(c->out + (query * c->H + head) * c->D * size(type), d, type, out / total, LANES);
    }
}

static void attention_worker(void *argument, int thread, int threads) {
    const attention_job *job = argument;
    const attention_args *c = job->args;
    i64 unit = 0;
    for (i64 b = 0; b < c->B; b++)
        for (i64 i = 0; i < job->sequences[b].parts * c->G; i++) {
            if (unit++ % threads != thread)
                continue;
            if (c->type == BF16)
                attend(c, BF16, job->sequences + b, b, i / c->G, i % c->G);
            else
                attend(c, F32, job->sequences + b, b, i / c->G, i % c->G);
        }
    meet();
    unit = 0;
    for (i64 b = 0; b < c->B; b++)
        for (i64 row = 0; row < job->sequences[b].queries * c->H; row++) {
            if (unit++ % threads != thread)
                continue;
            if (c->type == BF16)
                merge(c, BF16, job->sequences + b, b, row);
            else
                merge(c, F32, job->sequences + b, b, row);
        }
}

int attention(const attention_args *c) { /* returns how many sequences have over MAX_QUERIES, -1: no memory */
    attention_job job = {c, malloc(c->B * sizeof(sequence))};
    i64 floats = 0, work = 0;
    int left = 0;
    if (!job.sequences)
        return -1;
    for (i64 b = 0; b < c->B; b++) {
        sequence *s = job.sequences + b;
        i64 queries = c->starts[b + 1] - c->starts[b], length = c->lengths[b];
        s->queries = queries <= MAX_QUERIES ? queries : 0;
        left += queries > MAX_QUERIES;
        s->first = c->window > 0 ? MAX(length - queries + 1 - c->window, 0) / KEYS : 0;
        s->parts = s->queries ? (length - s->first * KEYS + KEYS - 1) / KEYS : 0;
        floats += s->parts * s->queries * c->H * (c->D + 2);
        work += s->queries * c->H * c->D * (length - s->first * KEYS);
    }
    float *partial = malloc((floats + 1) * sizeof(float));
    if (!partial) {
        free(job.sequences);
        return -1;
    }
    floats = 0;
    for (i64 b = 0; b < c->B; b++) {
        job.sequences[b].partial = partial + floats;
        floats += job.sequences[b].parts * job.sequences[b].queries * c->H * (c->D + 2);
    }
    launch(attention_worker, &job, work < SERIAL ? 1 : c->threads);
    free(partial);
    free(job.sequences);
    return left;
}
