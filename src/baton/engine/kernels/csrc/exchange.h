/* Ranks of one host that share memory: a meeting of all of them, which is all that is left of a collective there.
 *
 * Each rank writes its own columns of tensors that lie in the shared memory; after a meeting everyone may read what was written
 * before it. Nothing is copied and nothing is summed.
 */
#ifndef BATON_EXCHANGE_H
#define BATON_EXCHANGE_H

#include "common.h"

/* One for each rank, in shared memory, zero at first. */
typedef struct {
    _Alignas(64) _Atomic uint32_t turn; /* meetings this rank has come to */
    _Atomic uint32_t sleepers;          /* ranks asleep on `turn` */
} Seat;

typedef struct {
    Seat *seats;
    int32_t rank, size;
    uint32_t turn;
} Exchange;

/* Returns when all ranks have called it as often as this one. */
void exchange_meet(Exchange *e);

#endif
