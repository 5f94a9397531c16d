/* linear: y = x w^T and what the adapters make of it, in one launch. The adapters' shrink (a) comes first, then each
   thread takes columns of y: the base product, the expand (b) on top of it, and of both the gain and the shift.

   A row of y is summed in the same order whatever else is in the batch and whatever the number of threads. native.py
   packs the fields of linear_args, all of 8 bytes, in their order. */

#include <stdlib.h>

#include "dots.h"
#include "threads.h"

#define MAX_TOKENS 1024 /* as in native.py, which leaves more to the reference */
#define BLOCK 24 /* tokens that pass over some weights at a time: of 576 bfloat16 they fit the first level cache */
#define MAX_THREADS 256
#define COLUMNS 32 /* of y that a thread takes at a time: 64 bytes of bfloat16, so threads share no cache line */

/* Weights are prefetched into the second level cache this many bytes ahead, line after line, while 4 rows are in work:
   one Zen4 core then reads 20-22 GB/s instead of 11 (8 tokens: 7), two cores all that memory gives (30). */
#define AHEAD 16384

typedef struct {
    i64 threads, type, T, K, N;
    const char *x, *w; /* [T, K], [N, K] */
    char *y;           /* [T, N] */
    i64 S, adapter_type; /* S 0: no adapters, and nothing below is there */
    const char *a, *b;   /* [S, P, 8, K], [P, 8, N] */
    i64 a_slice, a_page, b_page; /* strides, elements */
    const int32_t *perm, *tiles; /* [T], [G, 2] */
    i64 G;
    const int32_t *pages; /* [G, kinds, W], already at this kind */
    const float *scales;
    i64 tile_stride, W; /* elements between tiles of pages and scales */
    const float *vectors; /* [V, 2, N]: gain and shift */
    i64 v_page;           /* stride, elements */
    const int32_t *vector_pages; /* [G, kinds], already at this kind; -1: none */
    i64 kinds;
    i64 bounds[];      /* S + 1 */
} linear_args;

typedef struct {
    i64 tile, start, count, pages; /* tokens perm[start : start + count] share one adapter: its bytes are read once */
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
    i64 page = c->pages[(*u)->tile * c->tile_stride + *p];
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
        float *h = job->h + u->start * ld + (s * c->W + p) * 8 + rank, scale = c->scales[u->tile * c->tile_stride + p];
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
    const int32_t *pages = c->pages + u->tile * c->tile_stride, *perm = c->perm + u->start + first;
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

INLINE void adjust(const linear_job *job, float *sums, i64 n0, i64 n1) { /* sums = gain * sums + shift */
    const linear_args *c = job->args;
    for (const run *u = job->runs; u < job->runs + job->num_runs; u++) {
        i64 page = c->vector_pages[u->tile * c->kinds];
        if (page < 0)
            continue;
        const float *gain = c->vectors + page * c->v_page, *shift = gain + c->N;
        for (i64 t = u->start; t < u->start + u->count; t++) {
            float *row = sums + c->perm[t] * COLUMNS;
            for (i64 n = n0; n < n1; n++)
                row[n - n0] = gain[n] * row[n - n0] + shift[n];
        }
    }
}

INLINE void prefetch_columns(const linear_job *job, i64 n0) { /* of b: they arrive during the base product */
    const linear_args *c = job->args;
    i64 width = size(c->adapter_type);
    for (const run *u = job->runs; u < job->runs + job->num_runs; u++)
        for (i64 p = 0; p < u->pages; p++) {
            const char *b = c->b + (c->pages[u->tile * c->tile_stride + p] * c->b_page + n0) * width;
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
    adjust(job, sums, n0, n1);
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

static int same_pages(const linear_args *c, i64 tile, i64 other) { /* and the same scales: the same mix */
    i64 one = tile * c->tile_stride, two = other * c->tile_stride;
    return c->vector_pages[tile * c->kinds] == c->vector_pages[other * c->kinds] &&
           !memcmp(c->pages + one, c->pages + two, c->W * sizeof(int32_t)) &&
           !memcmp(c->scales + one, c->scales + two, c->W * sizeof(float));
}

static i64 find_runs(linear_job *job) { /* neighbouring tiles with the same pages become one run */
    /* returns how many positions of perm are used, -1 where tiles list a token twice */
    const linear_args *c = job->args;
    i64 end = 0, tokens = 0;
    for (i64 tile = 0; tile < c->G; tile++) {
        run *last = job->runs + job->num_runs - 1;
        i64 start = c->tiles[2 * tile], count = c->tiles[2 * tile + 1], held = 0;
        const int32_t *pages = c->pages + tile * c->tile_stride;
        if (count == 0)
            continue;
        while (held < c->W && pages[held] >= 0)
            held++;
        if (held == 0 && c->vector_pages[tile * c->kinds] < 0)
            continue;
        tokens += count;
        if (tokens > c->T)
            return -1;
        end = MAX(end, start + count);
        if (job->num_runs && last->start + last->count == start && same_pages(c, last->tile, tile))
            last->count += count;
        else
            job->runs[job->num_runs++] = (run){tile, start, count, held};
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
