/* Ranks meet by counting: each has a counter that only it writes. Waiting ranks spin for at most SPIN_NS, then sleep on a futex, as the
 * threads of the pool do. A rank that has died is not noticed here; whoever notices it ends the process.
 */
#define _GNU_SOURCE
#include "exchange.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* Ranks leave one another by the length of a stage's tail; ranks that share cores need the core to get there. */
enum { SPIN_NS = 30000 };

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int is_behind(Seat *seat, uint32_t turn) { return (int32_t)(atomic_load(&seat->turn) - turn) < 0; }

static void wait_for(Seat *seat, uint32_t turn) {
    int64_t deadline = 0;
    while (is_behind(seat, turn)) {
        for (int i = 0; i < 32; i++) {
            if (!is_behind(seat, turn)) return;
            _mm_pause();
        }
        int64_t now = now_ns();
        if (deadline == 0) deadline = now + SPIN_NS;
        if (now >= deadline) break;
    }
    atomic_fetch_add(&seat->sleepers, 1);
    for (uint32_t seen; (int32_t)((seen = atomic_load(&seat->turn)) - turn) < 0;)
        syscall(SYS_futex, &seat->turn, FUTEX_WAIT, seen, NULL, NULL, 0);
    atomic_fetch_sub(&seat->sleepers, 1);
}

void exchange_meet(Exchange *e) {
    Seat *own = e->seats + e->rank;
    e->turn++;
    atomic_store(&own->turn, e->turn);
    if (atomic_load(&own->sleepers)) syscall(SYS_futex, &own->turn, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
    for (int32_t r = 0; r < e->size; r++)
        if (r != e->rank) wait_for(e->seats + r, e->turn);
}

/* A meeting outside a step, for tests and benchmarks. */
void bt_exchange_meet(Exchange *e) { exchange_meet(e); }
