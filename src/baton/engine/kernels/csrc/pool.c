/* A pool of threads that runs one job at a time: a list of stages, each a number of independent items.
 *
 * Nobody waits for a thread, only for work: a thread claims an item, and whoever finishes the last item of a stage opens the
 * next. A thread that the system has taken off its core between two items is simply not missed. That matters where several
 * workers share few cores, and it is why this is not OpenMP, whose barriers wait for every thread (and whose second runtime
 * in a process, beside torch's, is a trap of its own). Waiting threads spin for at most SPIN_NS, then sleep on a futex.
 *
 * Not here: what an item does. One job runs at a time in a process; further callers wait at the lock.
 */
#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "common.h"

/* Longer than most stages' tails, short enough that an idle worker takes nothing from others on its cores. */
enum { SPIN_NS = 20000 };
enum { THREAD_BITS = 10, MAX_THREADS = 256 };
#define ONE_ITEM ((uint64_t)1 << THREAD_BITS)

static struct {
    pthread_mutex_t lock;
    pid_t owner; /* threads do not survive a fork: a child starts its own */
    int started; /* helper threads alive, ids 1..started */
    /* The job. Written only while no item is out, so whoever holds an item may read it. */
    RunItem run;
    void *arg;
    const int32_t *items; /* of each stage, all > 0 */
    int64_t num_stages, stage;
    /* serial number of the stage << 32 | unclaimed items << THREAD_BITS | threads that may claim */
    _Alignas(64) _Atomic uint64_t word;
    _Alignas(64) _Atomic int32_t done; /* items of this stage */
    _Alignas(64) _Atomic uint32_t sleepers;
    _Atomic int running;
} pool = {.lock = PTHREAD_MUTEX_INITIALIZER};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint32_t *serial_address(void) { return (uint32_t *)(void *)&pool.word + 1; /* the upper half: x86 is little-endian */ }

static uint32_t serial(void) { return (uint32_t)(atomic_load(&pool.word) >> 32); }

/* Return when the serial number differs from `seen`. */
static void wait_for_stage(uint32_t seen) {
    int64_t deadline = 0;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (serial() != seen) return;
            _mm_pause();
        }
        int64_t now = now_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now >= deadline) break;
    }
    atomic_fetch_add(&pool.sleepers, 1);
    while (serial() == seen) syscall(SYS_futex, serial_address(), FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    atomic_fetch_sub(&pool.sleepers, 1);
}

/* Only while no item is out. `threads` 0 behind the last stage: the job is over. */
static void open_stage(int64_t stage, uint64_t threads) {
    uint64_t next = (atomic_load(&pool.word) >> 32) + 1, items = 0;
    if (stage < pool.num_stages) items = (uint64_t)pool.items[stage];
    else atomic_store(&pool.running, 0), threads = 0;
    pool.stage = stage;
    atomic_store(&pool.done, 0);
    atomic_store(&pool.word, next << 32 | items << THREAD_BITS | threads);
    if (atomic_load(&pool.sleepers)) syscall(SYS_futex, serial_address(), FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

/* Claim and run items; thread 0 returns when its job is over, helpers never do. */
static void work(int tid) {
    for (;;) {
        uint64_t word = atomic_load(&pool.word), threads = word & (ONE_ITEM - 1);
        int32_t left = (int32_t)((uint32_t)word >> THREAD_BITS);
        if (left > 0 && (uint64_t)tid < threads) {
            if (!atomic_compare_exchange_weak(&pool.word, &word, word - ONE_ITEM)) continue;
            int64_t stage = pool.stage;
            int32_t items = pool.items[stage];
            pool.run(pool.arg, stage, items - left, tid);
            if (atomic_fetch_add(&pool.done, 1) + 1 == items) open_stage(stage + 1, threads);
            continue;
        }
        if (tid == 0 && !atomic_load(&pool.running)) return;
        wait_for_stage((uint32_t)(word >> 32));
    }
}

static void *helper_main(void *tid) {
    work((int)(intptr_t)tid);
    return NULL;
}

/* Start helpers up to `threads` - 1; fewer when the system refuses one. */
static void ensure_helpers(int threads) {
    if (pool.owner != getpid()) {
        pool.owner = getpid();
        pool.started = 0;
        atomic_store(&pool.sleepers, 0);
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
}

void pool_run(int threads, int64_t num_stages, const int32_t *items, RunItem run, void *arg) {
    if (num_stages == 0) return;
    pthread_mutex_lock(&pool.lock);
    threads = threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads;
    ensure_helpers(threads);
    pool.run = run, pool.arg = arg, pool.items = items, pool.num_stages = num_stages;
    atomic_store(&pool.running, 1);
    open_stage(0, (uint64_t)threads);
    work(0);
    pthread_mutex_unlock(&pool.lock);
}
