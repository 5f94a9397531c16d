/* How a kernel spreads over the threads of OpenMP; without OpenMP one thread does all. */

#pragma once

#include <stdint.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#define SERIAL 32768 /* elements that one thread does in less time than waking a second one takes to pay off */

typedef void worker(void *job, int thread, int threads);

static inline void launch(worker *work, void *job, int64_t threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(job, omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    work(job, 0, 1);
}

static inline void meet(void) { /* every thread of the launch arrives before any goes on */
#ifdef _OPENMP
#pragma omp barrier
#endif
}

static inline void span(int64_t total, int thread, int threads, int64_t *low, int64_t *high) {
    *low = total * thread / threads;
    *high = total * (thread + 1) / threads;
}
