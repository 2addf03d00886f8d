/* A pool of threads that runs one job at a time, with barriers inside the job.
 *
 * Why not OpenMP: a decode step has some 250 barriers 20 us apart, which must be cheap, but two workers may share the same two
 * cores, where long spinning takes the time from the other one. Here every wait spins for at most SPIN_NS and then sleeps
 * on a futex. There is no second OpenMP runtime in the process either.
 *
 * Not here: what a job does. One job runs at a time in a process; further callers wait at the lock.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

enum { MAX_THREADS = 256, THREADS_MASK = 1023, GENERATION_STEP = 1024 };

static struct {
    pthread_mutex_t lock;
    pid_t owner; /* threads do not survive a fork: a child starts its own */
    int started; /* helper threads alive, ids 1..started */
    Job job;
    void *arg;
    int64_t spin_ns;
    /* Jobs handed out so far << 10 | threads of the newest. The count of threads travels in the same word, because a helper
     * that sits out may look late, when the next job is being set up. */
    _Alignas(64) _Atomic uint32_t generation;
    _Alignas(64) _Atomic uint32_t generation_sleepers;
    _Alignas(64) _Atomic uint32_t arrived; /* at the current barrier */
    _Alignas(64) _Atomic uint32_t phase;   /* barriers passed so far */
    _Alignas(64) _Atomic uint32_t phase_sleepers;
    _Alignas(64) _Atomic int64_t claimed;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER, .spin_ns = 50000};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Return when *word differs from `seen`. */
static void wait_change(_Atomic uint32_t *word, uint32_t seen, _Atomic uint32_t *sleepers, int64_t spin_ns) {
    int64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < 64; i++) {
            if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
            _mm_pause();
        }
        int64_t now = now_ns();
        if (deadline == 0) deadline = now + spin_ns;
        if (now >= deadline) break;
    }
    atomic_fetch_add(sleepers, 1);
    while (atomic_load(word) == seen) syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(sleepers, 1);
}

static void wake(_Atomic uint32_t *word, _Atomic uint32_t *sleepers) {
    if (atomic_load(sleepers)) syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

void pool_barrier(Worker *w) {
    if (w->threads == 1) {
        atomic_store_explicit(&pool.claimed, 0, memory_order_relaxed);
        return;
    }
    uint32_t phase = atomic_load_explicit(&pool.phase, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&pool.arrived, 1, memory_order_acq_rel) + 1 == (uint32_t)w->threads) {
        atomic_store_explicit(&pool.arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&pool.claimed, 0, memory_order_relaxed);
        atomic_store(&pool.phase, phase + 1);
        wake(&pool.phase, &pool.phase_sleepers);
    } else {
        wait_change(&pool.phase, phase, &pool.phase_sleepers, pool.spin_ns);
    }
}

int64_t pool_claim(void) { return atomic_fetch_add_explicit(&pool.claimed, 1, memory_order_relaxed); }

static void *helper_main(void *p) {
    int tid = (int)(intptr_t)p;
    uint32_t seen = 0; /* a job older than this helper has too few threads to include it */
    for (;;) {
        wait_change(&pool.generation, seen, &pool.generation_sleepers, pool.spin_ns);
        seen = atomic_load(&pool.generation);
        int threads = (int)(seen & THREADS_MASK);
        if (tid >= threads) continue;
        /* This helper takes part, so the job cannot end, nor `job` and `arg` change, before its last barrier below. */
        Worker w = {tid, threads};
        pool.job(&w, pool.arg);
        pool_barrier(&w);
    }
    return NULL;
}

/* Start helpers up to `threads` - 1; fewer when the system refuses one. Returns the thread count to use. */
static int ensure_helpers(int threads) {
    if (pool.owner != getpid()) {
        pool.owner = getpid();
        pool.started = 0;
        atomic_store(&pool.generation, 0);
        atomic_store(&pool.generation_sleepers, 0);
        atomic_store(&pool.arrived, 0);
        atomic_store(&pool.phase, 0);
        atomic_store(&pool.phase_sleepers, 0);
    }
    while (pool.started < threads - 1) {
        pthread_t thread;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        int failed = pthread_create(&thread, &attr, helper_main, (void *)(intptr_t)(pool.started + 1));
        pthread_attr_destroy(&attr);
        if (failed) break;
        pool.started++;
    }
    return (int)min64(threads, pool.started + 1);
}

void pool_run(int threads, Job job, void *arg) {
    pthread_mutex_lock(&pool.lock);
    threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    if (threads > 1) threads = ensure_helpers(threads);
    atomic_store_explicit(&pool.claimed, 0, memory_order_relaxed);
    Worker self = {0, threads};
    if (threads > 1) {
        pool.job = job;
        pool.arg = arg;
        uint32_t generation = atomic_load(&pool.generation);
        atomic_store(&pool.generation, (generation & ~(uint32_t)THREADS_MASK) + GENERATION_STEP + (uint32_t)threads);
        wake(&pool.generation, &pool.generation_sleepers);
    }
    job(&self, arg);
    pool_barrier(&self);
    pthread_mutex_unlock(&pool.lock);
}

/* How long a waiting thread spins before it sleeps. Longer helps a lone worker, shorter the others on the same cores. */
void bt_set_spin_ns(int64_t spin_ns) {
    pthread_mutex_lock(&pool.lock);
    pool.spin_ns = spin_ns;
    pthread_mutex_unlock(&pool.lock);
}
